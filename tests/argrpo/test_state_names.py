"""States by name: what is missing or of another kind is refused by that name."""

import pytest
import torch

from argrpo.state_names import whole_number


def test_a_counter_is_one_whole_number() -> None:
    assert whole_number({"steps": torch.tensor(3)}, "steps") == 3
    for wrong in (torch.tensor(3.0), torch.tensor([3]), torch.tensor(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="steps: expected an int64 number"):
            whole_number({"steps": wrong}, "steps")
    with pytest.raises(ValueError, match="steps: expected in the state"):
        whole_number({}, "steps")
