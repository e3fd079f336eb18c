"""Vehicle routing: the simulator against a plain loop over dictionaries, against programs and counts; real data."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import shared
from torch import Tensor

from benchmarks.routing_networks import Critic, EndToEnd, EndToEndCritic, Upper, Value
from benchmarks.routing_policies import (
    behaviours,
    fleet_program,
    flown,
    informed,
    none,
    observed,
    perfect_foresight,
    routing_logs,
    steered,
)
from sim2real.simulators.vehicle_routing import (
    NYC_BROOKLYN,
    SHENZHEN_DOWNTOWN_WEST,
    FleetState,
    RoutingScenario,
    RoutingSettings,
    draw_requests,
    match_trips,
    move_vehicles,
    read_routing_scenario,
    routing_features,
    routing_rollout,
    start_fleet,
)
from sim2real.solvers import integer_target, invert_flows, rebalance_flows, target_shares
from sim2real.solvers.flow_inverse import recover_target

SETTINGS = RoutingSettings(start_hour=8, minutes=5, demand=2.0, cost_per_minute=0.4, steps=5)
N = 4


def city(folder: Path, seed: int = 0, *, minutes: int = 60) -> Path:
    """A scenario file of four stations in the public format; travel times of trips change from minute to minute."""
    rng = np.random.default_rng(seed)
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    data = {
        "nlat": 2,
        "nlon": 2,
        "demand": [
            {
                "time_stamp": 480 + minute,
                "origin": i,
                "destination": j,
                "demand": float(rng.uniform(0.1, 0.8)),
                "travel_time": int(rng.integers(2, 18)),
                "price": float(rng.uniform(5, 20)),
            }
            for minute in range(minutes)
            for i, j in pairs
        ],
        "rebTime": [
            {"time_stamp": 8, "origin": i, "destination": j, "reb_time": 1.0 if i == j else float(rng.uniform(2, 16))}
            for i in range(N)
            for j in range(N)
        ],
        "totalAcc": [{"hour": 8, "acc": 83}],
        "topology_graph": [{"i": i, "j": (i + 1) % N} for i in range(N)]
        + [{"i": (i + 1) % N, "j": i} for i in range(N)],
    }
    path = folder / "city.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def here(tmp_path: Path) -> RoutingScenario:
    return read_routing_scenario(city(tmp_path), SETTINGS)


def test_a_scenario_file_becomes_steps(tmp_path: Path) -> None:
    path = city(tmp_path)
    here, data = read_routing_scenario(path, SETTINGS), json.loads(path.read_text())
    rows = [r for r in data["demand"] if r["origin"] == 1 and r["destination"] == 3 and 490 <= r["time_stamp"] < 495]
    rate = sum(r["demand"] for r in rows)
    assert float(here.rates[2, 1, 3]) == pytest.approx(2 * rate)
    assert float(here.prices[2, 1, 3]) == pytest.approx(sum(r["demand"] * r["price"] for r in rows) / rate)
    minutes = sum(r["demand"] * r["travel_time"] for r in rows) / rate
    assert int(here.trip_steps[2, 1, 3]) == max(round(minutes / 5), 1)
    assert here.fleet.tolist() == [20.0] * N  # 83 // 4
    assert here.step_cost == 2.0
    assert here.rates.shape == (SETTINGS.steps + 7, N, N)
    assert here.move_steps.diagonal().tolist() == [0] * N
    assert float(here.rates.diagonal(dim1=1, dim2=2).abs().max()) == 0


def by_hand(here: RoutingScenario, requests: np.ndarray, flows: np.ndarray, lossy: bool) -> tuple[float, list, float]:
    """One episode, vehicle group by vehicle group, as the public simulator keeps them."""
    idle = here.fleet.numpy().copy()
    passengers: dict[tuple[int, int, int], float] = {}
    moves: dict[tuple[int, int, int], float] = {}
    total, seen = 0.0, []
    for t in range(here.steps):
        gain = 0.0
        for i in range(N):
            for j in np.argsort(-here.prices[t, i].numpy(), kind="stable"):
                x = min(idle[i], requests[t, i, j])
                if x > 0:
                    idle[i] -= x
                    tau = int(here.trip_steps[t, i, j])
                    key = (i, int(j), t + tau)
                    passengers[key] = x + (0.0 if lossy else passengers.get(key, 0.0))
                    gain += x * (float(here.prices[t, i, j]) - here.step_cost * tau)
        total += max(0.0, gain)
        seen.append(idle.copy())
        for i in range(N):
            for j in range(N):
                if i != j and flows[t, i, j]:
                    idle[i] -= flows[t, i, j]
                    key = (i, j, t + int(here.move_steps[i, j]))
                    moves[key] = moves.get(key, 0.0) + flows[t, i, j]
                    total -= here.step_cost * int(here.move_steps[i, j]) * flows[t, i, j]
        for under_way in (passengers, moves):
            for key in [key for key in under_way if key[2] == t]:
                idle[key[1]] += under_way.pop(key)
    return total, seen, idle.sum() + sum(passengers.values()) + sum(moves.values())


@pytest.mark.parametrize("lossy", [False, True])
def test_the_batch_equals_a_plain_simulation(here: RoutingScenario, lossy: bool) -> None:
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    requests = draw_requests(here, 6, generator)

    def scatter(state: FleetState) -> Tensor:
        target = integer_target(torch.from_numpy(rng.dirichlet(np.ones(N), 6)), state.idle.sum(-1))
        return rebalance_flows(fleet_program(here), state.idle, target).flows

    run = routing_rollout(here, requests, scatter, lossy=lossy)
    for k in range(6):
        total, idle, vehicles = by_hand(here, requests[k].numpy(), run.flows[k].numpy(), lossy)
        assert float(run.returns[k]) == pytest.approx(total, abs=1e-9)
        np.testing.assert_array_equal(run.idle[k].numpy(), np.array(idle))
        assert float(run.vehicles[k]) == vehicles
    assert bool((run.vehicles == 80).all()) is not lossy


def test_features_show_what_is_due_and_expected(here: RoutingScenario) -> None:
    state, _ = match_trips(here, start_fleet(here, 1), torch.zeros(1, N, N).double())
    flows = torch.zeros(1, N, N).double()
    flows[0, 0, 1] = 3
    state, cost = move_vehicles(here, state, flows)
    later = int(here.move_steps[0, 1])
    assert float(cost) == -3 * here.step_cost * later
    seen = routing_features(here, state)[0] / 0.01
    assert seen.shape == (N, 13)
    assert seen[0, 0] == 17
    # left at 0, due at the end of step `later`: from step 1 on column 1 + k shows step 1 + k
    assert seen[1, 1:7].tolist() == [20.0 + 3.0 * (k + 2 == later) for k in range(6)]
    revenue = (here.rates[2:8] * here.prices[2:8]).sum(-1)
    torch.testing.assert_close(seen[:, 7:], revenue.T)


def test_the_dearest_requests_are_served_first(here: RoutingScenario) -> None:
    requests = torch.full((1, N, N), 9.0).double() * (1 - torch.eye(N).double())
    state, gain = match_trips(here, start_fleet(here, 1), requests)
    assert state.idle.tolist() == [[0.0] * N]  # 20 of 27 requests
    worth = 0.0
    for i in range(N):
        dearest = sorted(((float(here.prices[0, i, j]), j) for j in range(N) if j != i), reverse=True)
        for count, (price, j) in zip((9, 9, 2), dearest, strict=True):
            worth += count * (price - here.step_cost * int(here.trip_steps[0, i, j]))
    assert float(gain) == pytest.approx(worth)


def test_perfect_foresight_bounds_every_policy(here: RoutingScenario) -> None:
    requests = draw_requests(here, 3, torch.Generator().manual_seed(2))
    bound = torch.tensor([perfect_foresight(here, each) for each in requests]).double()
    for name, decide in behaviours(here, "nyc", 0).items():
        assert bool((routing_rollout(here, requests, decide).returns <= bound + 1e-6).all()), name
    # one vehicle trip that pays is all there is to win
    quiet = torch.zeros_like(requests[0])
    quiet[0, 0, 1] = 1.0
    worth = float(here.prices[0, 0, 1]) - here.step_cost * int(here.trip_steps[0, 0, 1])
    assert perfect_foresight(here, quiet) == pytest.approx(max(0.0, worth), abs=1e-9)


def test_logs_come_back_as_the_flows_they_hold(here: RoutingScenario) -> None:
    program = fleet_program(here)
    for name in ("inf", "dtv", "prop", "disp"):
        log = routing_logs(here, behaviours(here, "nyc", 3)[name], 30, 3)
        assert log.features.shape == log.next_features.shape == (30, N, 13)
        found = invert_flows(program, log.idle, log.flows)
        shares = target_shares(recover_target(log.idle, log.flows)).float()
        again = rebalance_flows(program, log.idle, integer_target(shares, log.idle.sum(-1))).flows
        moves = ~torch.eye(N, dtype=torch.bool)
        same = ((again == log.flows) | ~moves).all((-1, -2))
        assert bool(same[found.optimal].all()), name
        assert name == "inf" or bool(found.optimal.all()), name
    pairs = log.features[1:4], log.next_features[:3]  # one episode of four transitions
    assert torch.equal(*pairs)


def test_informed_rebalancing_goes_where_requests_are(here: RoutingScenario) -> None:
    """All requests at station 2, within reach of all: every vehicle goes there until its density is met."""
    busy = torch.zeros_like(here.rates)
    busy[:, 2, 0] = 1.0
    moves = torch.ones_like(here.move_steps) - torch.eye(N, dtype=torch.long)
    lone = RoutingScenario(
        busy, here.prices, here.trip_steps, moves, here.fleet, here.step_cost, here.edges, here.steps, here.minutes
    )
    flows = informed(lone, 3, 1.0)(start_fleet(lone, 1))[0]
    assert float(flows[:, [0, 1, 3]].sum()) == 0
    # sum_i (3 - tau) f = 9: three stay (3 each), whoever moves counts 2
    assert 3 * float(flows[2, 2]) + 2 * float(flows[[0, 1, 3], 2].sum()) <= 9
    assert float(flows[:, 2].sum()) >= 3


def test_networks_feed_the_lower_level(here: RoutingScenario) -> None:
    torch.manual_seed(0)
    upper, critic, value = (make(here.edges, N, 16) for make in (Upper, Critic, Value))
    x, u = torch.rand(7, N, 13), torch.softmax(torch.rand(7, N), -1)
    assert upper(x).shape == u.shape
    assert critic(x, u).shape == value(x).shape == (7,)
    # the same city with its stations renamed: the same answers, renamed
    order = torch.tensor([2, 0, 3, 1])
    renamed = Upper(torch.argsort(order)[here.edges], N, 16)
    renamed.load_state_dict({k: v for k, v in upper.state_dict().items() if "head" in k or "linear" in k}, strict=False)
    torch.testing.assert_close(renamed(x[:, order]), upper(x)[:, order])
    policy = lambda features: torch.softmax(upper(features.float()).double(), -1).detach()
    run = routing_rollout(here, draw_requests(here, 4, torch.Generator().manual_seed(0)), observed(here, policy))
    assert run.returns.isfinite().tolist() == [True] * 4


def test_end_to_end_flows_are_cut_or_projected(here: RoutingScenario) -> None:
    state = start_fleet(here, 1)
    wished = torch.zeros(1, N, N).double()
    wished[0, 0] = torch.tensor([50.0, 15.7, -3.0, 10.2])  # of 20; the diagonal does not count
    wished[0, 1] = torch.tensor([4.6, 0.0, 0.0, 0.0])
    policy = lambda features: wished.flatten(1)
    cut = flown(here, policy, projected=False)(state)[0]
    assert cut[:2].tolist() == [[0.0, 15.0, 0.0, 5.0], [4.0, 0.0, 0.0, 0.0]]
    fair = flown(here, policy, projected=True)(state)[0]
    assert fair[0].tolist() == [0.0, 12.0, 0.0, 8.0]  # 20 in proportion 15.7 to 10.2: 12.12 and 7.88
    assert fair[1].tolist() == [5.0, 15.0, 0.0, 0.0]
    torch.manual_seed(0)
    network, critic, x = EndToEnd(here.edges, N, 8), EndToEndCritic(here.edges, N, 8), torch.rand(3, N, 13)
    assert network(x).shape == (3, 2 * N * N)
    assert critic(x, network(x)[:, : N * N]).shape == (3,)
    learned = flown(here, lambda features: network(features.float()).detach()[:, : N * N], projected=True)
    run = routing_rollout(here, draw_requests(here, 2, torch.Generator().manual_seed(0)), learned)
    assert run.vehicles.tolist() == [80.0, 80.0]


def test_failures_say_what_is_wrong(here: RoutingScenario, tmp_path: Path) -> None:
    state = start_fleet(here, 1)
    flows = torch.zeros(1, N, N).double()
    flows[0, 0, 1] = 21
    with pytest.raises(ValueError, match=r"\+1 more than are idle"):
        move_vehicles(here, state, flows)
    with pytest.raises(ValueError, match="must be whole"):
        move_vehicles(here, state, 0.01 * flows)
    with pytest.raises(ValueError, match="flows must be"):
        move_vehicles(here, state, flows[0])
    with pytest.raises(ValueError, match="requests must be"):
        routing_rollout(here, torch.zeros(1, 2, N, N).double(), none(here))
    with pytest.raises(ValueError, match="must cover 12 steps"):
        read_routing_scenario(city(tmp_path, minutes=40), SETTINGS)
    data = json.loads(city(tmp_path).read_text())
    for change, message in (
        ({"totalAcc": [{"hour": 9, "acc": 5}]}, "no fleet size"),
        ({"rebTime": []}, "no travel times"),
    ):
        (tmp_path / "broken.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=message):
            read_routing_scenario(tmp_path / "broken.json", SETTINGS)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="it lacks"):
        read_routing_scenario(tmp_path / "broken.json", SETTINGS)


@pytest.mark.parametrize(
    ("city_name", "file", "settings", "fleet", "requests", "published"),
    [
        ("nyc", "nyc_brooklyn", NYC_BROOKLYN, 1498, 193.2, {"none": 28.0, "inf": 56.9}),
        ("shz", "shenzhen_downtown_west", SHENZHEN_DOWNTOWN_WEST, 1768, 269.25, {"none": 59.9, "inf": 60.0}),
    ],
    ids=["nyc", "shenzhen"],
)
def test_real_cities(
    city_name: str,
    file: str,
    settings: RoutingSettings,
    fleet: int,
    requests: float,
    published: dict[str, float],
) -> None:
    """Against an independent implementation (thousands, 15 episodes each with a spread of 1.0 to 1.3 thousand)."""
    here = read_routing_scenario(shared(f"data/amod/scenario_{file}.json"), settings)
    assert float(here.fleet.sum()) == fleet
    assert float(here.rates[:20].sum()) / 20 == pytest.approx(requests, abs=0.1)
    drawn = draw_requests(here, 15, torch.Generator().manual_seed(3))
    for name, value in published.items():
        run = routing_rollout(here, drawn, behaviours(here, city_name, 0)[name], lossy=True)
        # the means of two samples of 15 differ by 0.42 thousand (1 sigma): three sigma, 0.3 % false alarms each
        assert float(run.returns.mean()) / 1000 == pytest.approx(value, abs=1.3), name


def test_equal_shares_are_no_worse_steered_than_floored(here: RoutingScenario) -> None:
    """Rounding to nearest leaves no vehicle unassigned."""
    state = start_fleet(here, 1)
    share = lambda state: torch.tensor([[0.33, 0.33, 0.33, 0.01]]).double()
    reached = recover_target(state.idle, steered(here, share)(state))
    assert reached.tolist() == [[27.0, 26.0, 26.0, 1.0]]


def test_requests_and_cities_that_do_not_fit_are_refused(here: RoutingScenario) -> None:
    stay = lambda state: torch.zeros(len(state.idle), N, N)
    drawn = draw_requests(here, 2, torch.Generator().manual_seed(0))
    for wrong in (drawn + 0.5, -drawn - 1, torch.nan * drawn):
        with pytest.raises(ValueError, match="whole numbers of at least 0"):
            routing_rollout(here, wrong, stay)
    # other types of whole numbers are
    assert torch.equal(routing_rollout(here, drawn.int(), stay).returns, routing_rollout(here, drawn, stay).returns)
    with pytest.raises(ValueError, match="at least 11"):  # five steps and six of lookahead
        replace(here, rates=here.rates[:10])
    with pytest.raises(ValueError, match="'prices' must be"):
        replace(here, prices=here.prices[:, :3])
    with pytest.raises(ValueError, match="'move_steps' must be"):
        replace(here, move_steps=here.move_steps[:3])
