"""What a folder of answers says of itself goes into a model card as text, not as Markdown."""

from ctc_drafter.train.publish import _corpus


def test_markup_in_names_is_shown_as_it_is() -> None:
    name = "[click](http://evil.example) <img src=x onerror=y>\n# head |"
    row = _corpus({"source": {"name": name, "licence": "**MIT**"}, "target": "a`b", "prompts": 3})
    assert row[0] == r"\[click\](http://evil.example) \<img src=x onerror=y\> \# head |"
    assert row[1] == r"\*\*MIT\*\*"
    assert row[3].startswith(r"a\`b")
    assert _corpus({"source": {"name": "hub:owner/my_data"}})[0] == "hub:owner/my_data"
