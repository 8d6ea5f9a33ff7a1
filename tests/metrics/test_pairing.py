"""Matching of results, ground truths and LQ images by file name."""

from pisa_jax.metrics.pairing import pair_files


def make_folder(path, *names):
    """A folder of empty files: matching reads names only."""
    path.mkdir()
    for name in names:
        (path / name).touch()
    return path


def test_files_match_by_stem_and_without_marks(tmp_path):
    sr = make_folder(tmp_path / "sr", "0801x4.png", "0802_SR.png", "0803.png", "img_1.png", "img_10.png")
    gt = make_folder(tmp_path / "gt", "0801.png", "0802_HR.png", "0803.png", "img_1.png", "img_10.png")
    lq = make_folder(tmp_path / "lq", "0801x4.png", "0802_LR4.png", "0803x4.png", "img_1.png", "img_10.png")
    items, problems = pair_files(sr, gt, lq)
    assert problems == {}
    assert {item.name: (item.gt.stem, item.lq.stem) for item in items} == {
        "0801x4.png": ("0801", "0801x4"),
        "0802_SR.png": ("0802_HR", "0802_LR4"),
        "0803.png": ("0803", "0803x4"),
        "img_1.png": ("img_1", "img_1"),
        "img_10.png": ("img_10", "img_10"),
    }


def test_equal_file_names_are_preferred_to_equal_stems(tmp_path):
    sr, gt = (make_folder(tmp_path / name, "a.png", "a.tiff") for name in ("sr", "gt"))
    items, problems = pair_files(sr, gt, None)
    assert problems == {}
    assert {item.name: item.gt.name for item in items} == {"a.png": "a.png", "a.tiff": "a.tiff"}


def test_ambiguous_matches_are_problems(tmp_path):
    sr = make_folder(tmp_path / "sr", "a_x2.png", "a_x4.png", "b_SR.png")
    gt = make_folder(tmp_path / "gt", "a.png", "b_HR.png", "b_GT.png")
    items, problems = pair_files(sr, gt, None)
    assert items == []
    assert problems.keys() == {"a_x2.png", "a_x4.png", "b_SR.png"}
    assert "a.png matches several images" in problems["a_x2.png"]
    assert "several files match: b_GT.png, b_HR.png" in problems["b_SR.png"]
