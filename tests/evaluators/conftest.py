"""Makes the helper modules of these tests importable (pytest's importlib mode does not change sys.path), and one network."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_small_products():
    """One BLAS thread: on a busy machine, several threads take many times as long on matrices this small."""
    import scipy.linalg  # noqa: F401, so that its BLAS is loaded and can be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


@dataclass(frozen=True)
class MadeInception:
    """A whole Inception-v3 with random weights: its frozen graph, its torch port, and their writer."""

    graph: Path
    port: Path
    writer: object


@pytest.fixture(scope="session")
def made_inception(tmp_path_factory):
    import torch
    from inception_graph_maker import Writer, pictures

    from evaluators.features.tf1_resize import resize_numpy

    folder = tmp_path_factory.mktemp("inception")
    made = MadeInception(folder / "made.pb", folder / "made.pth", Writer(seed=0))
    image = (resize_numpy(pictures(3, 299)) - 128) / 128
    made.writer.write(torch.from_numpy(image).permute(0, 3, 1, 2), made.graph)
    torch.save(made.writer.state_dict(), made.port)
    return made
