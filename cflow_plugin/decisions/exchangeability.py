"""Whether new scores still come from where the reference scores came from (a conformal test martingale)."""

__all__ = ["ExchangeabilityTest"]

import bisect
import math
from collections.abc import Iterable

import numpy as np

from cflow_plugin.decisions.conformal import p_value_of_rank

# Bets are 1 + s L(p) with L a Legendre polynomial on [0, 1]: the first sees scores shift, the second spread or narrow.
_STRENGTHS = np.array([-1.0, -0.5, 0.5, 1.0])


class ExchangeabilityTest:
    r"""A conformal test martingale: evidence that scores have changed, valid however long one looks.

    Each new score gets a p-value by its rank among all scores so far, the reference's included, ties broken at random.
    As long as all are exchangeable, the p-values are independent and uniform. So no betting against that can be
    expected to win: whoever starts with 1 and bets on each p-value has a capital :math:`M_t` with
    :math:`E M_t = 1`, and by Ville's inequality :math:`P(\exists t: M_t \ge 1 / \delta) \le \delta`. A capital of 100
    is reached with a probability of at most 1 % in all eternity, unless something has changed.

    The capital is spread over bets on higher, lower, wider and narrower scores, and put in little by little, the share
    1 / (t (t + 1)) at step t: a change meets fresh money whenever it comes, and a late one is found as surely.

    Args:
        reference: Scores of good images, in any order, ``(n,)``.
        seed: Seed of the tie-breaking.

    Attributes:
        log_capital: Natural logarithm of the capital.

    References:
        Vovk, Nouretdinov, Gammerman: Testing Exchangeability On-Line. ICML 2003.
    """

    def __init__(self, reference: Iterable[float], seed: int = 0) -> None:
        self._seen = sorted(float(score) for score in reference)
        self._generator = np.random.default_rng(seed)
        self._steps = 0
        self._log_stakes = np.full(2 * len(_STRENGTHS), -math.inf)
        self.log_capital = 0.0

    def update(self, score: float) -> float:
        """Look at one more score.

        Args:
            score: The score.

        Returns:
            Its p-value among all so far: small for a score that is higher than most.
        """
        low, high = bisect.bisect_left(self._seen, score), bisect.bisect_right(self._seen, score)
        seen = len(self._seen)
        p = p_value_of_rank(seen - high, high - low, seen, self._generator.random())
        self._seen.insert(high, float(score))
        self._steps += 1
        fresh = -math.log(self._steps * (self._steps + 1) * len(self._log_stakes))
        shift = 2 * p - 1
        spread = 6 * p * p - 6 * p + 1
        with np.errstate(divide="ignore"):  # a bet may lose all it has
            gains = np.log1p(np.concatenate([_STRENGTHS * shift, _STRENGTHS * spread]))
        self._log_stakes = np.logaddexp(self._log_stakes, fresh) + gains
        reserve = -math.log(self._steps + 1)
        self.log_capital = float(np.logaddexp.reduce([reserve, *self._log_stakes]))
        return p
