"""Exact values of a continuous, multi-modal behaviour: a mixture of linear controllers with quadratic cost.

x' = Ax + Bu + w, w ~ N(0, W); u ~ Σ_i α_i N(K_i x + k_i, Σ_i) with constant α; reward -(x·Qx + u·Ru).
Then V(x) = -(x·Px + 2 p·x + c) exactly, and Q(x, ·) is quadratic (`QuadraticValue`).
"""

from dataclasses import dataclass

import numpy as np

from lom.study.quadratic import Array, QuadraticValue, hyper_value


@dataclass(frozen=True, kw_only=True)
class Controller:
    """One mode: u ~ N(gain x + offset, covariance), chosen with probability `weight`."""

    weight: float
    gain: Array
    offset: Array
    covariance: Array

    def means(self, states: Array) -> Array:
        """float64[N, X] -> float64[N, U]."""
        means: Array = states @ self.gain.T + self.offset
        return means


@dataclass(frozen=True, kw_only=True)
class LinearQuadraticProblem:
    """The dynamics, the cost and the controllers; solved on first use.

    Attributes:
        dynamics: A, float64[X, X].
        control: B, float64[X, U].
        noise_covariance: W, float64[X, X].
        state_cost, action_cost: Q float64[X, X] and R float64[U, U].
        discount: γ.
    """

    dynamics: Array
    control: Array
    noise_covariance: Array
    state_cost: Array
    action_cost: Array
    discount: float
    controllers: tuple[Controller, ...]

    def solve(self) -> tuple[Array, Array, float]:
        """(P, p, c) of the behaviour's V(x) = -(x·Px + 2 p·x + c), by linear solves in P, then p, then c."""
        size, discount = len(self.dynamics), self.discount
        closed = [self.dynamics + self.control @ each.gain for each in self.controllers]
        weights = [each.weight for each in self.controllers]
        kron = sum(w * np.kron(f.T, f.T) for w, f in zip(weights, closed, strict=True))
        cost = self.state_cost + sum(c.weight * c.gain.T @ self.action_cost @ c.gain for c in self.controllers)
        quadratic: Array = np.linalg.solve(np.eye(size**2) - discount * kron, cost.reshape(-1)).reshape(size, size)

        average = np.einsum("m,mij->ij", weights, closed)
        drift = np.zeros(size)
        for each, loop in zip(self.controllers, closed, strict=True):
            push = self.control @ each.offset
            drift += each.weight * (each.gain.T @ self.action_cost @ each.offset + discount * loop.T @ quadratic @ push)
        linear: Array = np.linalg.solve(np.eye(size) - discount * average.T, drift)

        constant = 0.0
        for each in self.controllers:
            push = self.control @ each.offset
            spread = self.control @ each.covariance @ self.control.T + self.noise_covariance
            constant += each.weight * (
                each.offset @ self.action_cost @ each.offset
                + np.trace(self.action_cost @ each.covariance)
                + discount * (push @ quadratic @ push + 2 * linear @ push + np.trace(quadratic @ spread))
            )
        return quadratic, linear, float(constant / (1 - discount))

    def value(self, state: Array) -> float:
        """V^b of the behaviour."""
        quadratic, linear, constant = self.solve()
        return -float(state @ quadratic @ state + 2 * linear @ state + constant)

    def action_value(self, state: Array) -> QuadraticValue:
        """Q^b(x, ·)."""
        quadratic, linear, constant = self.solve()
        moved = self.dynamics @ state
        after = moved @ quadratic @ moved + 2 * linear @ moved + constant
        after += np.trace(quadratic @ self.noise_covariance)
        return QuadraticValue(
            constant=-float(state @ self.state_cost @ state + self.discount * after),
            slope=-2 * self.discount * self.control.T @ (quadratic @ moved + linear),
            curvature=2 * (self.action_cost + self.discount * self.control.T @ quadratic @ self.control),
        )

    def hyper_values(self, states: Array) -> Array:
        """Q_H(x, i) for every controller, float64[N, X] -> float64[N, M]."""
        rows = []
        for state in states:
            value = self.action_value(state)
            rows.append([hyper_value(value, each.means(state[None])[0], each.covariance) for each in self.controllers])
        return np.array(rows)

    def step(self, states: Array, actions: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Rewards float64[N] and next states float64[N, X]."""
        rewards = -np.einsum("ni,ij,nj->n", states, self.state_cost, states)
        rewards -= np.einsum("ni,ij,nj->n", actions, self.action_cost, actions)
        noise = rng.multivariate_normal(np.zeros(len(self.dynamics)), self.noise_covariance, len(states))
        return rewards, states @ self.dynamics.T + actions @ self.control.T + noise

    def behave(self, states: Array, rng: np.random.Generator) -> Array:
        """Actions of the behaviour, float64[N, X] -> float64[N, U]."""
        chosen = rng.choice(len(self.controllers), size=len(states), p=[each.weight for each in self.controllers])
        every = np.stack(
            [
                each.means(states)
                + rng.multivariate_normal(np.zeros(len(each.covariance)), each.covariance, len(states))
                for each in self.controllers
            ]
        )
        actions: Array = every[chosen, np.arange(len(states))]
        return actions
