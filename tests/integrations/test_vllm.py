"""The shipped drafter in vLLM on a CPU: plain vLLM's text, our own acceptance, OpenAI's API. For `make test-vllm`."""

import copy
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from torch.nn import functional as fn

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.drafters.baselines.dflash import DFlashConfig, DFlashDrafter
from ctc_drafter.drafters.block import frame_logits
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.predictor import nearest_map
from ctc_drafter.evaluate.methods import Chained
from ctc_drafter.integrations.export import export
from ctc_drafter.load import load_drafter, load_target
from ctc_drafter.quickstart import TARGET_DIR
from helpers import without_copies

pytestmark = pytest.mark.vllm

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
OPTIONS = {"dtype": "float32", "max_model_len": 512}
TOKENS = 96
PLACES = 6.0  # spread of what each place carries by itself
QUESTIONS = [
    "Why is the sky blue?",
    "What is 12 times 7?",
    "Tom has 3 apples and buys 5 more. How many apples does he have?",
    "Write a short story about a cat.",
    "List three colours.",
    "Explain what a river is to a child.",
]


@pytest.fixture(scope="module")
def shipped():
    """Target, tokenizer and drafter in float32, and prompts as token ids."""
    target, tokenizer = load_target("tiny", "float32", "cpu")
    drafter = with_todays_parts(load_drafter("tiny", target, tokenizer), target.embed)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return target, drafter, [list(prompt) for prompt in prompts]


def without_carry(drafter):
    """The same drafter whose newest state says nothing: worse, so that it is seen whether an engine carries."""
    other = copy.deepcopy(drafter)
    with torch.no_grad():
        for weight in other.carry.parameters():
            weight.zero_()
    return other


def with_todays_parts(drafter, embed):
    """The same drafter with what those that are trained now have: places that carry something of their own and of the
    root, tied tables (those that come nearest), joint terms."""
    config = copy.deepcopy(drafter.config)
    config.carry_rank, config.carry_root = 4, True
    config.predictor_tied, config.joint_tokens, config.joint_rank = True, 8, 4
    other, own = CTCDrafter(config), drafter.state_dict()
    tables = {name: own.pop(f"predictor.{name}.weight") for name in ("table", "output")}
    other.load_state_dict(own, strict=False)
    with torch.no_grad():
        for name, table in tables.items():
            tokens = drafter.predictor.drafted(drafter.vocabulary if name == "output" else None)
            weight, shift = nearest_map(embed(tokens), table)
            other.predictor.get_submodule(name).weight.copy_(weight.T)
        other.predictor.output.bias.copy_(shift)
        other.joint.token.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (other.carry.own, other.carry.up, other.carry_root.own, other.carry_root.up):
            weight.normal_(std=PLACES, generator=generator)
        for weight in (other.carry_root.weight, other.carry_root.down.weight):
            weight.normal_(std=0.05, generator=generator)
    return other.to(drafter.device, drafter.dtype).eval()


@pytest.fixture(scope="module")
def folders(shipped, tmp_path_factory):
    """Where the shipped drafter is exported to."""
    target, drafter, _ = shipped
    root = tmp_path_factory.mktemp("exported")
    export(drafter, target.config, str(TARGET_DIR), root / "shipped", 8)
    return root


def token_frames(drafter, target, prompts, steps=16):
    """A DFlash drafter that starts from a CTC drafter's layers and has learned the answers to these prompts."""
    names = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("vocab_size", "hidden_size", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    names += ("mask_token_id", "target_layer_ids", "target_num_layers")
    config = DFlashConfig(draft_length=drafter.config.frames, **{name: getattr(drafter.config, name) for name in names})
    stock, own = DFlashDrafter(config).to(drafter.device, drafter.dtype), drafter.state_dict()
    stock.load_state_dict({name: own[name] for name in stock.state_dict()})
    answers = plain_generate(target, prompts, max_new_tokens=TOKENS, eos=()).tokens
    texts = [torch.tensor([[*prompt, *answer]]) for prompt, answer in zip(prompts, answers, strict=True)]
    features = [target.hidden_states(text, stock.feature_layers)[0].clone() for text in texts]
    places = [
        torch.arange(len(prompt), text.shape[1] - stock.frames) for prompt, text in zip(prompts, texts, strict=True)
    ]
    optimizer = torch.optim.AdamW(stock.parameters(), lr=2e-3)
    for step in range(steps * len(texts)):
        text, anchors = texts[step % len(texts)], places[step % len(texts)]
        states = stock.draft_states(features[step % len(texts)], text, anchors[None], target.embed)
        labels = text[0, anchors[:, None] + torch.arange(1, 1 + stock.frames)]
        fn.cross_entropy(frame_logits(states[0], target.head).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return stock.eval()


def run_vllm(folder, name, model, options, *runs, environment=None):
    """Results of the runs, see `vllm_run`; the process's last words where it failed."""
    job = folder / f"{name}.json"
    job.write_text(json.dumps({"model": str(model), "options": OPTIONS | options, "runs": runs}))
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "vllm_run.py"), str(job)]
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (environment or {})
    done = subprocess.run(command, env=os.environ | ENVIRONMENT | own, capture_output=True, text=True, check=False)
    out = job.with_suffix(".out")
    return json.loads(out.read_text()) if out.exists() else done.stderr[-20000:] + done.stdout[-20000:]


def greedy(prompts):
    return {"prompts": prompts, "sampling": {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}}


def beta_of(counted):
    """Acceptance length, by vLLM's counters."""
    drafts = counted["vllm:spec_decode_num_drafts"]
    assert drafts > 50
    return 1 + counted["vllm:spec_decode_num_accepted_tokens"] / drafts


def our_beta(target, drafter, prompts):
    """Acceptance length of the same chain, decoded by ourselves."""
    length = drafter.config.draft_length
    done = generate(target, Chained(drafter), prompts, max_new_tokens=TOKENS, nodes=length, min_probability=0.0, eos=())
    accepted = [count for row in done.accepted for count in row]
    return 1 + sum(accepted) / len(accepted)


@pytest.fixture(scope="module")
def plain(shipped, folders):
    """What vLLM writes without a drafter: greedily, and as cold as it samples."""
    hot = {"prompts": shipped[2][:4], "sampling": {"temperature": 0.01, "max_tokens": 16, "seed": 1}}
    return run_vllm(folders, "plain", TARGET_DIR, {}, greedy(shipped[2]), hot)


def test_the_folder_alone_gives_plain_text_and_our_acceptance(shipped, folders, plain):
    target, drafter, prompts = shipped
    cold = {"temperature": 0.01, "max_tokens": 16, "seed": 1}
    hot = {"temperature": 2.0, "max_tokens": 16, "seed": 1}
    runs = [greedy(prompts), *({"prompts": prompts[:4], "sampling": sampling} for sampling in (cold, hot))]
    found = run_vllm(folders, "ctc", folders / "shipped", {}, *runs)
    assert isinstance(found, list), found
    assert found[0]["tokens"] == plain[0]["tokens"]
    ours = our_beta(target, without_copies(drafter), prompts)
    assert our_beta(target, without_carry(without_copies(drafter)), prompts) < 0.9 * ours
    assert beta_of(found[0]["counted"]) == pytest.approx(ours, rel=0.05)
    # Sampling: vLLM's temperatures of drafted tokens are garbage on a CPU unless patched.
    assert found[1]["tokens"] == plain[1]["tokens"]
    assert all(a != b for a, b in zip(found[2]["tokens"], found[1]["tokens"], strict=True))


def test_a_dflash_drafter_needs_no_plugin(shipped, folders, plain):
    target, drafter, prompts = shipped
    stock = token_frames(drafter, target, prompts)
    export(stock, target.config, str(TARGET_DIR), folders / "stock")
    found = run_vllm(folders, "dflash", folders / "stock", {}, greedy(prompts), environment={"VLLM_PLUGINS": ""})
    assert isinstance(found, list), found
    assert found[0]["tokens"] == plain[0]["tokens"]
    ours = our_beta(target, stock, prompts)
    assert ours > 1.5
    assert beta_of(found[0]["counted"]) == pytest.approx(ours, rel=0.05)


def test_vllm_does_not_start_where_ctc_would_be_bypassed(shipped, folders):
    speculation = {
        "method": "dflash",
        "model": str(folders / "shipped"),
        "num_speculative_tokens": shipped[1].config.frames,
    }
    said = run_vllm(folders, "bypassed", TARGET_DIR, {"speculative_config": speculation}, greedy(shipped[2][:1]))
    assert isinstance(said, str)
    assert 'add "use_local_argmax_reduction": true' in said


@contextmanager
def vllm_serve(folder, port=18765):
    """What `vllm serve FOLDER` runs, until the block ends; gives its address.

    vllm-cpu's own command asks for a distribution by the name of vllm, and stops where there is none.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4"]
    said: list[str] = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=os.environ | ENVIRONMENT, **pipes) as process:
        reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
        reader.start()
        try:
            for _ in range(900):
                assert process.poll() is None, "".join(said[-40:])
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (URLError, TimeoutError):
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join()  # before `with` closes the pipe under it


def test_vllm_serve_answers_the_openai_client(shipped, folders, plain):
    from openai import OpenAI

    with vllm_serve(folders / "shipped") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        extra = {"ignore_eos": True, "return_token_ids": True}
        for prompt, expected in zip(shipped[2], plain[0]["tokens"], strict=True):
            answer = client.completions.create(
                model=model, prompt=prompt, temperature=0, max_tokens=TOKENS, extra_body=extra
            )
            assert answer.choices[0].token_ids == expected
        with urlopen(f"{url}/metrics", timeout=60) as reply:
            counted = [line for line in reply.read().decode().splitlines() if "num_accepted_tokens_total{" in line]
    assert float(counted[0].split()[-1]) > 50
