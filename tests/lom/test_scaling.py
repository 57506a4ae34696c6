import torch

from lom.scaling import ActionScaler, ObservationNormaliser


def test_normaliser_is_plain_mean_and_std_and_leaves_constant_dimensions_unscaled() -> None:
    normaliser = ObservationNormaliser(3)
    normaliser.fit(torch.tensor([[0.0, 5.0, 1e6], [2.0, 5.0, 1e6]]))
    assert normaliser.mean.tolist() == [1.0, 5.0, 1e6]
    assert normaliser.std.tolist() == [1.0, 1.0, 1.0]
    assert normaliser(torch.tensor([[2.0, 5.1, 1e6]])).tolist()[0][0] == 1.0
    assert abs(normaliser(torch.tensor([[2.0, 5.1, 1e6]])).tolist()[0][1] - 0.1) < 1e-5


def test_normaliser_keeps_a_small_spread_that_is_real() -> None:
    normaliser = ObservationNormaliser(1)
    normaliser.fit(torch.tensor([[0.0], [2e-4]]))
    assert abs(normaliser.std.item() - 1e-4) < 1e-9


def test_action_scaler_maps_bounds_to_unit_and_back() -> None:
    scaler = ActionScaler(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]))
    assert scaler.to_unit(torch.tensor([[-2.0, 10.0], [0.0, 5.0]])).tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    assert scaler.from_unit(torch.tensor([[-1.0, 1.0], [0.0, 0.0]])).tolist() == [[-2.0, 10.0], [0.0, 5.0]]
    assert torch.allclose(scaler.log_half_range, torch.log(torch.tensor([2.0, 5.0])))


def test_actions_never_leave_the_bounds() -> None:
    low, high = torch.tensor([-0.1]), torch.tensor([0.3])
    actions = ActionScaler(low, high).from_unit(torch.tensor([[-1.0], [1.0], [1.0000001], [7.0]]))
    assert (actions >= low).all()
    assert (actions <= high).all()
