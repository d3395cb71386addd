"""The benchmarks measure what they say, on a corpus that takes seconds."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from infra.bench import embed, image_rows, text_rows, text_rows_on_ray
from infra.bench.measure import Watch, processes, ratio, spread
from infra.bench.pillow_views import make_view
from infra.bench.text_rows import Corpus, open_corpus
from pipelines.data.views import ViewConfig
from pipelines.data.vocabulary import Vocabulary
from pipelines.recipes import recipe
from tests.pictures import write_pictures
from tests.test_decode import encode, scene


@pytest.fixture
def corpus(corpus_dir: Path, vocabulary: Vocabulary) -> Corpus:
    return open_corpus([str(corpus_dir)], vocabulary)


def test_pure_functions_are_measured(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "ROW_LENGTHS", (64,))
    result = text_rows.measure(corpus, repeats=1)
    assert result["text_megabytes"] == pytest.approx(0.4, abs=0.1)
    assert set(result["masks_million_tokens_per_second"]["rows of 64"]) == {*text_rows.MASKINGS}
    assert result["rows_mb_per_second"]["median"] > 0
    flat, lengths = text_rows.unmasked_rows(corpus, 64)
    assert corpus.vocabulary.mask not in flat
    assert len(lengths) == corpus.make_rows()


def test_a_watch_sees_this_process_alone_where_it_has_started_none() -> None:
    with Watch() as watch:
        while watch.cpu_seconds("driver") < 0.1:
            sum(range(100_000))
            watch.look()
    found = processes()[os.getpid()]
    assert found.role == "driver"
    assert len(watch.peak_megabytes("driver")) == 1
    assert 0 < watch.cpu_seconds("driver", "workers") <= found.cpu_seconds


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", ["text-mini", "image-tiny"])
def test_embedding_is_measured_beside_the_bare_encoder(
    name: str, corpus_dir: Path, tmp_path: Path
) -> None:
    data = corpus_dir
    if name == "image-tiny":
        data = tmp_path / "pictures"
        write_pictures(data, num_pictures=40)
    job = embed.make_job(recipe(name), [str(data)], tmp_path)
    result = embed.measure(job, repeats=1)
    assert result["items"] == job.manifest.records_where("training") >= 40
    assert result["workers_to_bare_cpu_ratio"]["median"] > 0


def test_spreads_and_ratios_are_of_pairs() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert ratio([1.0, 9.0], [2.0, 3.0]) == {"median": 1.75, "min": 0.5, "max": 3.0}


def test_the_peer_makes_the_views_that_are_asked_for() -> None:
    photo = Image.fromarray(scene(300, 400))
    still = ViewConfig(size=64, flip=0, jitter=0, greyscale=0, crop_scale=(1, 1), crop_ratio=(1, 1))
    # No square is as large as the picture, so the whole of it is taken.
    whole = np.asarray(photo.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)

    def off(expected: NDArray[Any], **changes: Any) -> float:
        view = make_view(photo, replace(still, **changes))
        return float(np.abs(np.asarray(view) - expected).mean())

    assert off(whole) == 0
    assert off(whole[:, ::-1], flip=1) == 0
    luma = np.repeat((whole @ [0.299, 0.587, 0.114])[..., None], 3, axis=2)
    assert off(luma, greyscale=1) < 1
    assert 0 < off(whole, jitter=1) < 60
    assert 0 < off(whole, blur=1, blur_sigma=(2, 2)) < 60


def test_photos_are_prepared_and_made_into_views_by_the_pure_functions(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        side = 299 + number  # the first is too small
        (tmp_path / "photos" / f"{number}.png").write_bytes(encode(scene(side, 400), "PNG"))
    (tmp_path / "photos" / "README.txt").write_text("no photo")
    size = image_rows.SIZES[0]
    assert len(list(image_rows.read_photos([str(tmp_path / "photos")], size))) == 2
    contest = image_rows.prepare([str(tmp_path / "photos")], size, 24, tmp_path / "made", 1)
    assert contest.source.plan.manifest.records_where("training") == 24
    contest.make_pure()
    order = contest.source.plan.order(0)
    assert contest.source.num_rows(order) == contest.source.table(order).num_rows


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_and_the_peer_make_all_views_and_both_are_measured(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encode(scene(375, 500), "PNG"))
    photos = [str(tmp_path / "photo.png")]
    contest = image_rows.prepare(photos, image_rows.SIZES[0], 96, tmp_path / "made", 1)
    result = image_rows.measure(contest, repeats=1)
    for name in ("ours", "peer", "pure"):
        assert result[f"{name}_views_per_cpu_second"]["median"] > 0
    least, most = image_rows.BLOCK_BYTES
    assert least < 1e6 * result["consumer"]["block_megabytes"] < most
    assert result["consumer"]["megabytes_per_cpu_second"]["median"] > 0
    assert 0 < result["peak_megabytes_of_a_worker"]["ours, its own"] < 1000


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_makes_the_rows_of_the_pure_functions_and_its_workers_are_measured(
    corpus: Corpus,
) -> None:
    text_rows_on_ray.warm_up(corpus)
    memory = text_rows_on_ray.measure_memory(corpus)
    assert memory["driver"] > 50
    assert max(memory["workers"]) > 50
    result = text_rows_on_ray.measure(corpus, repeats=1)
    speeds = [result[f"{name}_mb_per_second"]["median"] for name in ("workers", "all_processes")]
    assert speeds[0] > speeds[1] > 0
