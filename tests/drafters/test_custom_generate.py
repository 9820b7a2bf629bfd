"""A drafter's folder in `generate(..., custom_generate=folder, trust_remote_code=True)`, as transformers says."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import TextStreamer, dynamic_module_utils, pipeline

from ctc_drafter import AutoDrafter, UserError
from ctc_drafter.drafters import custom_generate
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.registry import fresh_drafter
from ctc_drafter.target.model import Target
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 9, 30, 31, 5, 9, 30]])
USUAL: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FILE = Path("custom_generate", "generate.py")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies code that it runs into a cache of its own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_drafter(tiny_llama()).save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


@pytest.fixture
def proposals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A 1 for each session of a CTC drafter."""
    begun: list[int] = []
    begin = CTCDrafter.begin

    def counted(self: CTCDrafter, *args: Any) -> Any:
        begun.append(1)
        return begin(self, *args)

    monkeypatch.setattr(CTCDrafter, "begin", counted)
    return begun


def test_generate_drafts_by_the_name_of_the_folder(folder: Path, proposals: list[int]) -> None:
    model = tiny_llama()
    expected = model.generate(IDS, **USUAL)
    for name in (str(folder), f"{folder}/"):
        found = model.generate(IDS, **USUAL, custom_generate=name, trust_remote_code=True)
        assert torch.equal(found, expected)
    found = model.generate(input_ids=IDS, **USUAL, custom_generate=str(folder), trust_remote_code=True)
    assert torch.equal(found, expected)
    assert len(proposals) == 3


def test_code_runs_only_where_it_is_trusted(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        tiny_llama().generate(IDS, **USUAL, custom_generate=str(folder), trust_remote_code=False)


def test_streamers_stop_strings_and_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    by_name = {"custom_generate": str(folder), "trust_remote_code": True}
    expected = model.generate(IDS, **USUAL)
    model.generate(IDS, **USUAL, **by_name, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0, IDS.shape[1] :]).strip()
    letters = [text for token in expected[0, 8:-1] if (text := tokenizer.decode(token)).isascii()]
    stop = {"stop_strings": letters[:1], "tokenizer": tokenizer}
    found = model.generate(IDS, **USUAL, **by_name, **stop)
    assert torch.equal(found, model.generate(IDS, **USUAL, **stop))
    assert found.shape[1] < expected.shape[1]
    with pytest.raises(UserError, match="leave out assistant_model"):
        model.generate(IDS, **USUAL, **by_name, assistant_model=model)
    with pytest.raises(UserError, match="beams"):
        model.generate(IDS, **USUAL, **by_name, num_beams=2)


def test_pipelines(folder: Path, proposals: list[int]) -> None:
    plain = pipeline("text-generation", model=tiny_llama(), tokenizer=tiny_tokenizer(), device="cpu")
    greedy = {"do_sample": False, "max_new_tokens": 8}
    expected = plain("the cat sat", **greedy)
    assert plain("the cat sat", **greedy, custom_generate=str(folder), trust_remote_code=True) == expected
    assert len(proposals) == 1


def test_it_is_loaded_once_for_a_model_and_gone_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = AutoDrafter.from_pretrained

    def counted(name: str, *args: Any) -> Any:
        loads.append(name)
        return load(name, *args)

    monkeypatch.setattr(AutoDrafter, "from_pretrained", counted)
    model = tiny_llama()
    for _ in range(3):
        model.generate(IDS, **USUAL, custom_generate=str(folder), trust_remote_code=True)
    assert loads == [str(folder)]
    other = tiny_llama(seed=3)
    expected = other.generate(IDS, **USUAL)
    assert torch.equal(other.generate(IDS, **USUAL, custom_generate=str(folder), trust_remote_code=True), expected)
    assert len(loads) == 2
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


def test_folders_alike_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code is the same, and transformers keeps one copy of it."""
    model, opened = tiny_llama(), []
    for place in ("a", "b"):
        tiny_drafter(model, seed=ord(place)).save_pretrained(tmp_path / place / "drafter")
    load = AutoDrafter.from_pretrained
    monkeypatch.setattr(AutoDrafter, "from_pretrained", lambda *given: opened.append(given[0]) or load(*given))
    folders = [str(tmp_path / place / "drafter") for place in ("a", "b")]
    for folder in folders * 2:
        model.generate(IDS, **USUAL, custom_generate=folder, trust_remote_code=True)
    assert opened == folders


def test_another_caller_says_which_drafter(folder: Path) -> None:
    model = tiny_llama()
    expected = model.generate(IDS, **USUAL)
    assert torch.equal(custom_generate.generate(model, str(folder), inputs=IDS, **USUAL), expected)
    with pytest.raises(UserError, match="give drafter=, the folder or repository of this file"):
        custom_generate.generate(model, inputs=IDS, **USUAL)


def test_a_revision_is_the_drafters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(name: str, revision: str, **_options: Any) -> str:
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = tiny_llama()
    found = custom_generate.generate(model, "owner/drafter", revision="v1", inputs=IDS, **USUAL)
    assert torch.equal(found, model.generate(IDS, **USUAL))
    assert asked == [("owner/drafter", "v1")]


@pytest.mark.parametrize("method", ["medusa", "eagle"])
def test_every_drafter_carries_the_file(method: str, tmp_path: Path) -> None:
    model = tiny_llama()
    fresh_drafter(Target.wrap(model), tiny_tokenizer(), 1, method).eval().save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == Path(custom_generate.__file__).read_bytes()
    found = model.generate(IDS, **USUAL, custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(found, model.generate(IDS, **USUAL))


def test_it_says_what_is_missing(folder: Path) -> None:
    """transformers' own words would be to install a package of that name from PyPI, which is not ours."""
    code = (
        "import sys; sys.modules['ctc_drafter'] = None; from importlib.machinery import SourceFileLoader\n"
        f"try: SourceFileLoader('generate', {str(folder / FILE)!r}).load_module()\n"
        "except ImportError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == (
        "this drafter needs the ctc_drafter package; install CTC-drafter from its repository"
    )
    needed = dynamic_module_utils.get_imports(folder / FILE)
    assert "weakref" in needed
    assert "ctc_drafter" not in needed
