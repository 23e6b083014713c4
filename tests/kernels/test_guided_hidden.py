"""kernels/guided_hidden.py: the mix of two branches and its gradients.

Tolerance: three fp32 operations on values of size up to 20, an ulp of which is 2e-6; in half
precision one unit in the last place more, because Triton's interpreter truncates.
"""

import pytest
import torch

from argrpo.kernels import guided_hidden as module
from argrpo.kernels.guided_hidden import guided_hidden, guided_hidden_reference

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SHAPES = [(1, 1, 1, 7), (3, 5, 5, 100), (2, 9, 4, 1280), (2, 5, 0, 16)]  # N, T, T', D


@pytest.fixture(params=["kernel", "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Runs each test on both implementations."""
    if request.param == "cpu":
        monkeypatch.setattr(module, "uses_triton", lambda tensor: False)
        monkeypatch.setattr(module, "_CPU_ELEMENTS", 8000)  # more than one part
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_and_gradients_agree_with_fp64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    num_images, num_tokens, num_guided, width = shape
    cond = torch.randn(num_images, num_tokens, width, device=device).to(dtype).requires_grad_()
    uncond = torch.randn(num_images, num_guided, width, device=device).to(dtype).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (cond, uncond)]
    dout = torch.randn_like(cond)
    got = guided_hidden(cond, uncond, 2.5)
    want = guided_hidden_reference(*wide, 2.5)
    assert got.dtype == dtype
    results = (got, *torch.autograd.grad(got, (cond, uncond), dout))
    expected = (want, *torch.autograd.grad(want, wide, dout.double()))
    limit = TOLERANCE[dtype]
    for name, one, other in zip(("mix", "d cond", "d uncond"), results, expected, strict=True):
        torch.testing.assert_close(
            *(one.double(), other),
            rtol=limit,
            atol=limit if dtype == torch.float32 else 1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_a_scale_of_one_gives_the_conditional_branch(device: torch.device) -> None:
    cond, uncond = torch.randn(2, 3, 4, 64, device=device).bfloat16()
    assert torch.equal(guided_hidden(cond, uncond, 1.0), cond)


def test_an_image_does_not_depend_on_its_batch(device: torch.device) -> None:
    cond, uncond = torch.randn(2, 3, 4, 100, device=device)
    together = guided_hidden(cond, uncond, 4.0)
    for image in range(3):
        only = slice(image, image + 1)
        assert torch.equal(guided_hidden(cond[only], uncond[only], 4.0), together[only])


def test_wrong_inputs_are_refused_by_name(device: torch.device) -> None:
    cond = torch.randn(2, 4, 8, device=device)
    cases = [
        ("cond", cond[0], cond),
        ("cond", cond.double(), cond),
        ("cond", cond.transpose(0, 1), cond),
        ("uncond", cond, cond.transpose(0, 1).contiguous().transpose(0, 1)),
        ("uncond", cond, cond[:1]),
        ("uncond", cond, cond.half()),
        ("uncond", cond, torch.zeros(2, 5, 8, device=device)),
        ("uncond", cond, cond[..., :4].contiguous()),
    ]
    for name, given, other in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            guided_hidden(given, other, 2.0)
