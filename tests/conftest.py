import pytest
import torch as th
from hypothesis import settings

# A deadline for each example would fail on a busy machine
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """The networks of the tests are small: with more threads, they wait for each other most of the time."""
    th.set_num_threads(1)
