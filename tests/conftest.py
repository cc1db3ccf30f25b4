import pytest
import torch as th


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """The networks of the tests are small: with more threads, they wait for each other most of the time."""
    th.set_num_threads(1)
