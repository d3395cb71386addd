"""What many tests share: one local Ray, a small corpus, and its vocabulary."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.cluster import cluster
from pipelines.data.vocabulary import Vocabulary
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.recipes import text_tiny
from tests.corpus import make_documents, write_corpus


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run one local Ray of five CPUs, with a home of its own for what Ray writes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        with cluster("", 4, verbose=False):
            yield


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six jsonl shards, 120 documents and 400 kB; not to be written to."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """Return the vocabulary of the tiny recipe, trained on other documents of the same topics."""
    texts = [document.text for document in make_documents(60, seed=1)]
    return train_vocabulary(texts, text_tiny().vocabulary)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: for small tensors two are slower, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
