"""Files of prompts, and the report about the images that have one."""

import json
import logging
import unicodedata

import pytest

from pisa_jax.data.loader import make_loader
from pisa_jax.data.prompts import digest_prompts, read_prompts, report_long_prompts
from pisa_jax.data.sources import fake_source


def line(path, prompt, **options):
    return json.dumps({"path": path, "prompt": prompt}, **options)


def test_a_byte_order_mark_and_separators_inside_prompts_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    texts = ["dog\u2028grass", "cat\u0085sofa"]
    content = "\r\n".join(line(f"{index}.png", text, ensure_ascii=False) for index, text in enumerate(texts))
    path.write_text(content, encoding="utf-8-sig", newline="")
    assert read_prompts(path) == {"0.png": texts[0], "1.png": texts[1]}


def test_paths_are_compared_in_their_normal_form(tmp_path):
    names = ("./a.png", "sub\\b.png", unicodedata.normalize("NFD", "größe.png"))
    (tmp_path / "p.jsonl").write_text("\n".join(line(name, "x") for name in names))
    assert list(read_prompts(tmp_path / "p.jsonl")) == ["a.png", "sub/b.png", unicodedata.normalize("NFC", "größe.png")]


def test_two_prompts_of_one_image_are_refused_if_they_differ(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{line('a.png', 'dog')}\n{line('./a.png', 'dog')}\n")
    assert read_prompts(path) == {"a.png": "dog"}
    path.write_text(f"{line('a.png', 'dog')}\n\n{line('./a.png', 'cat')}\n")
    with pytest.raises(ValueError, match=r"p\.jsonl, line 3: 'a.png' has the prompt 'cat', and in line 1 'dog'"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "holds no prompts"),
        (line("a.png", "\ud800 dog"), "line 1: .*not valid Unicode"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"path": "a.png", "prompt": ' + "1" * 10_000 + "}", "line 1"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_the_share_of_images_with_a_prompt_is_logged(caplog):
    prompts = {"./fake/000001.png".removesuffix(".png"): "a", "fake\\000002": "b", "other": "c"}
    options = {"batch_size": 8, "crop": 16, "seed": 0, "degrade": lambda gt, rng: gt, "prompts": prompts}
    with caplog.at_level(logging.INFO):
        batch = next(make_loader(fake_source(8, 16), **options))
    (message,) = [record.getMessage() for record in caplog.records if "prompts" in record.getMessage()]
    assert "2 of 8 images have one (25.0 %)" in message
    assert "1 prompts belong to no image" in message
    assert dict(zip(batch["path"].tolist(), batch["prompt"].tolist(), strict=True))["fake/000002"] == "b"


def test_prompts_that_the_text_encoder_cuts_are_counted(caplog):
    texts = ["a dog", "dog, " * 40, "grass, " * 15, "größe, " * 2, "dog, " * 40]
    prompts = {f"{index}.png": text for index, text in enumerate(texts)}
    report_long_prompts(prompts, lambda text: len(text.split()) + 2, 20)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("prompts: 2 of 5 have more than 20 tokens and are cut")
    assert "the longest has 42: dog, dog" in message
    caplog.clear()
    report_long_prompts(prompts, lambda text: len(text.split()) + 2, 42)
    assert not caplog.records


def test_the_digest_depends_on_the_prompts_only():
    assert digest_prompts({"a": "x", "b": "y"}) == digest_prompts({"b": "y", "a": "x"})
    assert digest_prompts({"a": "x", "b": "y"}) != digest_prompts({"a": "y", "b": "x"})
    assert digest_prompts({}) is None
