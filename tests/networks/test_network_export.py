"""The network as TorchScript, exported program, ONNX and compiled graph gives what it gives in Python."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

SHALLOW = {"channels": (4, 8), "attention_levels": (False, True)}
CASES = [
    pytest.param({}, (16, 24), id="2D"),
    pytest.param({"spatial_dims": 3, "ff_size": 8}, (8, 8, 16), id="3D"),
    pytest.param({"conditioning_levels": [], "prediction_type": "epsilon"}, (16, 24), id="plain"),
    pytest.param({"stem_stride": 2}, (16, 32), id="stem of stride 2"),
]


def inputs(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy masks, a timestep for each, images."""
    return torch.randn(2, 2, *size), torch.tensor([500, 20]), torch.randn(2, 3, *size)


@torch.no_grad()
@pytest.mark.parametrize(("changes", "size"), CASES)
def test_script_takes_image_encoded_context_and_image_alone(small_net, changes, size):
    net = small_net(**changes)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    x, t, image = inputs(size)
    expected = net(x, t, image)
    torch.testing.assert_close(scripted(x, t, image), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scripted(x, t, scripted.encode_context(image)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scripted(image), net(image), atol=1e-5, rtol=0)


def test_script_refuses_sizes_with_the_same_message(small_net):
    scripted = torch.jit.script(small_net())
    with pytest.raises(torch.jit.Error, match=r"the nearest size that is: \[16, 24\]"):
        scripted(torch.zeros(1, 3, 17, 23))


@torch.no_grad()
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(("changes", "size"), CASES)
def test_exported_program_agrees(small_net, changes, size, encoded):
    net = small_net(**changes)
    x, t, image = inputs(size)
    arguments = (x, t, net.encode_context(image) if encoded else image)
    program = torch.export.export(net, arguments).module()
    torch.testing.assert_close(program(*arguments), net(*arguments), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(("changes", "size"), CASES)
def test_onnx_agrees(small_net, changes, size, encoded):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = small_net(**changes)
    x, t, image = inputs(size)
    context = net.encode_context(image) if encoded else image
    file = io.BytesIO()
    torch.onnx.export(net, (x, t, context), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    feeds = [x, t, *(context if encoded else [context])]
    actual = session.run(None, {i.name: value.numpy() for i, value in zip(session.get_inputs(), feeds)})[0]
    np.testing.assert_allclose(actual, net(x, t, context).numpy(), atol=1e-4)


@pytest.mark.parametrize(("changes", "size"), CASES[:2])
def test_compiled_graph_agrees_forward_and_backward(small_net, changes, size):
    net = small_net(**SHALLOW, **changes)
    arguments = inputs(size)
    expected = net(*arguments)
    expected.square().mean().backward()
    gradients = [p.grad for p in net.parameters()]
    net.zero_grad()
    torch._dynamo.reset()
    actual = torch.compile(net, backend="aot_eager", fullgraph=True)(*arguments)
    actual.square().mean().backward()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    for gradient, parameter in zip(gradients, net.parameters()):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_to_native_code(small_net):
    net = small_net(**SHALLOW)
    arguments = inputs((16, 24))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net)(*arguments), net(*arguments), atol=1e-4, rtol=0)
