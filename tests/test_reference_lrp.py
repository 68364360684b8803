"""The LRP references, checked against numbers worked out by hand and against calculus."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import reference_lrp as ref

W = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
B = torch.tensor([1.0, -1.0], dtype=torch.float64)
X = torch.tensor([2.0, 1.0], dtype=torch.float64)
R = torch.tensor([1.0, 9.0], dtype=torch.float64)  # the outputs themselves, W X + B
ZEROS = torch.zeros(2, dtype=torch.float64)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        (ref.epsilon, {}, [2 + 6, -2 + 4]),
        (ref.epsilon, {"eps": lambda z: 2 * z}, [1 + 3, -1 + 2]),
        (ref.epsilon, {"eps": 1.0}, [2 / 2 + 6 / 10 * 9, -2 / 2 + 4 / 10 * 9]),
        (ref.alpha_beta, {}, [2 * 2 / 3 + 2 * 6 / 10 * 9, -1 + 2 * 4 / 10 * 9]),
        (ref.alpha_beta, {"alpha": 1.0, "beta": 0.0}, [2 / 3 + 6 / 10 * 9, 4 / 10 * 9]),
        (ref.zplus, {}, [2 / 3 + 6 / 10 * 9, 4 / 10 * 9]),
        (ref.gamma, {"gamma": 1.0}, [4 / 4 + 12 / 19 * 9, -2 / 4 + 8 / 19 * 9]),
        (ref.zbox, {"low": -1.0, "high": 2.0}, [3 / 5 + 9 / 17 * 9, 2 / 5 + 8 / 17 * 9]),
        (ref.wsquare, {}, [1 / 5 + 9 / 25 * 9, 4 / 5 + 16 / 25 * 9]),
        (ref.wsquare, {"with_bias": True}, [1 / 6 + 9 / 26 * 9, 4 / 6 + 16 / 26 * 9]),
        (ref.flat, {}, [5.0, 5.0]),
    ],
)
def test_a_rule_gives_the_numbers_worked_out_by_hand(rule, options, expected):
    got = rule(W, B, X, R, **{"eps": 0.0, **options})
    torch.testing.assert_close(got, vector(*expected))


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        # x = [1, -2]: contributions [1, 4] and [3, -8], outputs 6 and -6.
        (ref.epsilon, {}, [1 + 3, 4 - 8]),
        (ref.alpha_beta, {}, [2 * 1 / 6 * 6 - 2 * 6, 2 * 4 / 6 * 6 + 8 / 9 * 6]),
        (ref.zplus, {}, [1 / 6 * 6 - 6, 4 / 6 * 6]),
        (ref.gamma, {"gamma": 1.0}, [2 / 12 * 6 + 3 / 15 * 6, 8 / 12 * 6 - 16 / 15 * 6]),
    ],
)
def test_signs_of_inputs_are_taken_by_contribution_not_by_weight(rule, options, expected):
    x = vector(1.0, -2.0)
    got = rule(W, B, x, W @ x + B, **{"eps": 0.0, **options})
    torch.testing.assert_close(got, vector(*expected))


def test_modified_parameters_share_by_their_own_output():
    got = ref.modified_params(W**2, 0 * B, X, R, eps=0.0)
    torch.testing.assert_close(got, vector(2 / 6 + 18 / 34 * 9, 4 / 6 + 16 / 34 * 9))


def test_the_stabiliser_pushes_away_from_zero_and_takes_zero_for_positive():
    z = vector(-2.0, -0.0, 0.0, 3.0)
    assert ref.stabilised(z, 0.5).tolist() == [-2.5, 0.5, 0.5, 3.5]


def test_zero_inputs_get_relevance_from_flat_and_w_square_alone():
    x = ZEROS
    for rule in (ref.epsilon, ref.zplus, ref.alpha_beta, ref.gamma):
        assert rule(W, B, x, R).tolist() == [0.0, 0.0]
    for rule in (ref.flat, ref.wsquare):
        torch.testing.assert_close(rule(W, B, x, R, eps=0.0).sum(), R.sum())


def test_an_output_of_exactly_zero_passes_nothing_under_gamma():
    rows = vector(1.0, -1.0)[None]
    assert ref.gamma(rows, vector(0.0), vector(1.0, 1.0), vector(5.0)).tolist() == [0.0, 0.0]


def test_without_bias_and_stabiliser_relevance_is_conserved():
    x = vector(1.0, 3.0)
    for rule in (ref.epsilon, ref.zplus, ref.alpha_beta, ref.gamma, ref.wsquare, ref.flat):
        torch.testing.assert_close(rule(W[:1], ZEROS[:1], x, R[:1], eps=0.0).sum(), R[0])


def test_the_softmax_rule_gives_the_numbers_worked_out_by_hand_and_leaves_masks_at_zero():
    x = vector(0.0, math.log(3.0), -math.inf)
    got = ref.softmax_attn(x, vector(1.0, 2.0, 0.0))
    torch.testing.assert_close(got, vector(0.0, math.log(3.0) * (2.0 - 0.75 * 3.0), 0.0))


def test_the_layer_norm_rule_gives_the_numbers_worked_out_by_hand():
    norm = nn.LayerNorm(2, eps=0.0).double()
    # x = [3, 1]: mean 2, std 1, so y = [1, -1] and W = [[.5, -.5], [-.5, .5]].
    got = ref.layer_norm(norm, vector(3.0, 1.0)[None], vector(1.0, 2.0)[None])
    torch.testing.assert_close(got, vector(1.5 + 3.0, -0.5 - 1.0)[None])


def test_uniform_pass_and_stop_do_what_they_say():
    a, b = torch.ones(2, 3), torch.ones(3)
    whole = torch.arange(6.0).reshape(2, 3)
    to_a, to_b = ref.uniform([a, b], whole)
    torch.testing.assert_close(to_a, whole.double() / 2)
    torch.testing.assert_close(to_b, whole.double().sum(0) / 2)
    assert ref.pass_(a, whole).equal(whole.double())
    assert not ref.stop(a, whole).any()


LAYERS = {
    "linear": (nn.Linear(3, 2), (3,)),
    "linear without bias": (nn.Linear(3, 2, bias=False), (3,)),
    "linear over time": (nn.Linear(3, 2), (4, 3)),
    "weight norm": (weight_norm(nn.Linear(3, 2)), (3,)),
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 7)),
    "conv1d same": (nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 5)),
    "conv1d circular": (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 4)),
    "conv1d replicate": (nn.Conv1d(1, 2, 3, padding=2, padding_mode="replicate"), (1, 4)),
    "conv2d groups": (nn.Conv2d(4, 2, (2, 3), groups=2, dilation=(2, 1)), (4, 4, 3)),
    "conv2d reflect": (nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="reflect"), (1, 3, 4)),
    "conv3d": (nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=1), (1, 2, 3, 2)),
    "transposed 1d": (nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1), (2, 3)),
    "transposed 2d": (nn.ConvTranspose2d(2, 4, 2, padding=1, groups=2), (2, 3, 3)),
    "transposed 3d": (nn.ConvTranspose3d(1, 1, 2, dilation=2), (1, 2, 2, 2)),
    "batch norm": (nn.BatchNorm1d(3).eval(), (3,)),
    "batch norm over images": (nn.BatchNorm2d(2, affine=False).eval(), (2, 2, 3)),
}


def layer_and_batch(name: str) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).double()
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(drawn if "batch norm" in name else 2 * drawn - 1)
    return layer, torch.randn(2, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_dense_layer_computes_what_the_layer_computes(name):
    layer, x = layer_and_batch(name)
    matrix, bias = ref.dense_affine(layer, x.shape[1:])
    dense = (x.flatten(1) @ matrix.T + bias).reshape(layer(x).shape)
    torch.testing.assert_close(dense, layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_lrp_0_of_the_output_itself_is_input_times_gradient(name):
    layer, x = layer_and_batch(name)
    x.requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ref.relevance(layer, x, y, ref.epsilon, eps=0.0), x * gradient)


@pytest.mark.parametrize("name", LAYERS)
def test_flat_and_w_square_conserve_wherever_every_output_reads_an_input(name):
    layer, x = layer_and_batch(name)
    incoming = torch.rand(layer(x).shape, generator=torch.Generator().manual_seed(0)).double()
    reads = ref.connections(layer, x.shape[1:]).connected.any(1).reshape(incoming.shape[1:])
    for rule in (ref.flat, ref.wsquare):
        got = ref.relevance(layer, x, incoming * reads, rule, eps=0.0)
        torch.testing.assert_close(got.flatten(1).sum(1), (incoming * reads).flatten(1).sum(1))


def test_flat_counts_an_existing_weight_that_is_zero():
    layer = nn.Linear(2, 1).double()
    layer.weight.data.copy_(vector(0.0, 1.0)[None])
    got = ref.relevance(layer, vector(1.0, 1.0)[None], vector(4.0)[None], ref.flat, eps=0.0)
    torch.testing.assert_close(got, vector(2.0, 2.0)[None])


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate", "zeros"])
@pytest.mark.parametrize("rule", [ref.zplus, ref.gamma, ref.alpha_beta, ref.wsquare, ref.flat])
def test_a_repeated_input_collects_the_relevance_of_its_copies(rule, mode):
    # The same by hand: pad first, explain the unpadded convolution, hand copies back by calculus.
    generator = torch.Generator().manual_seed(3)
    layer = nn.Conv1d(1, 2, 3, padding=2, padding_mode=mode).double()
    bare = nn.Conv1d(1, 2, 3).double()
    bare.load_state_dict(layer.state_dict())
    x = torch.randn(2, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    padded = nn.functional.pad(x, (2, 2), mode="constant" if mode == "zeros" else mode)
    incoming = layer(x).detach()
    if mode == "zeros" and rule in (ref.wsquare, ref.flat):
        incoming[:, :, 0] = incoming[:, :, 1] = incoming[:, :, -1] = incoming[:, :, -2] = 0
    at_padded = ref.relevance(bare, padded, incoming, rule)
    (expected,) = torch.autograd.grad(padded, x, at_padded)
    torch.testing.assert_close(ref.relevance(layer, x, incoming, rule), expected)


def test_the_z_box_takes_corners_per_input_and_skips_padding():
    layer, x = layer_and_batch("conv1d")
    low, high = torch.full_like(x[0], -4.0), torch.full_like(x[0], 4.0)
    incoming = layer(x).detach()
    by_tensor = ref.relevance(layer, x, incoming, ref.zbox, low=low, high=high, eps=0.0)
    by_number = ref.relevance(layer, x, incoming, ref.zbox, low=-4.0, high=4.0, eps=0.0)
    torch.testing.assert_close(by_tensor, by_number)
    torch.testing.assert_close(by_tensor.sum((1, 2)), incoming.sum((1, 2)))


def test_modify_changes_the_effective_weights_and_leaves_the_layer_alone():
    layer, x = layer_and_batch("weight norm")
    assert isinstance(layer, nn.Linear)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    matrix, bias = ref.dense_affine(layer, x.shape[1:], lambda w: w.clamp(min=0))
    torch.testing.assert_close(matrix, layer.weight.detach().clamp(min=0))
    torch.testing.assert_close(bias, layer.bias.detach().clamp(min=0))
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


def conv_net() -> tuple[nn.Sequential, Tensor]:
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)
    ).double()
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return net, torch.randn(3, 1, 3, 3, generator=generator, dtype=torch.float64)


def test_lrp_0_through_a_rectifier_network_is_input_times_gradient():
    net, x = conv_net()
    x.requires_grad_()
    y = net(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)

    def lrp_0(*args: Tensor) -> Tensor:
        return ref.epsilon(*args, eps=0.0)

    rules = [lrp_0 if isinstance(layer, (nn.Conv2d, nn.Linear)) else None for layer in net]
    torch.testing.assert_close(ref.propagate(list(net), x, y, rules), x * gradient)


def test_a_stack_is_its_layers_one_after_another():
    net, x = conv_net()
    rules = [ref.flat, None, None, ref.zplus, None, ref.epsilon]
    incoming = net(x).detach()
    hidden = nn.Sequential(*list(net)[:3])(x)
    middle = nn.Sequential(*list(net)[:5])(x)
    R_middle = ref.relevance(net[5], middle, incoming, ref.epsilon)
    R_hidden = ref.relevance(net[3], hidden, R_middle, ref.zplus)
    expected = ref.relevance(net[0], x, R_hidden.reshape(3, 2, 2, 2), ref.flat)
    torch.testing.assert_close(ref.propagate(list(net), x, incoming, rules), expected)
