"""Predict the seconds of a call with a model learned online while serving."""

from collections.abc import Sequence

FORGETTING = 0.99  # of the step-time model, per step
TRUST, SWEEPS = 0.5, 4  # see StepModel
BELIEVED = 20.0  # weight, in calls, of the initial ratio of mean to typical seconds, 1


class StepModel:
    """Mean seconds of a call: a weighted sum of its terms, times the ratio of mean to typical seconds.

    The weights are learned by recursive least squares on relative error, with forgetting (Åström and Wittenmark 2008,
    *Adaptive control*, section 2.2, in information form) and never negative. With relative errors a call during which
    the machine stalled does not bend the weights. They predict a typical call, however, while a queue depends on the
    mean, so the sums of measured and of typical seconds are kept too, and their ratio is the factor.

    guess: the initial weights; `likely`: terms of a few likely calls. At each of these the guess keeps counting as
    `TRUST` measured calls, so that terms without new measurements stay near it instead of drifting.
    """

    def __init__(self, guess: Sequence[float], likely: Sequence[Sequence[float]]):
        # Every term is scaled to about one, or the sweeps below would converge too slowly.
        self.scale = [max(terms[index] for terms in likely) for index in range(len(guess))]
        self.weights = [weight * scale for weight, scale in zip(guess, self.scale)]
        count = range(len(guess))
        self.prior = [[0.0] * len(guess) for _ in count], [0.0] * len(guess)
        self.sums = [[0.0] * len(guess) for _ in count], [0.0] * len(guess)
        self.measured = self.expected = BELIEVED * self._typical(likely[0])
        for terms in likely:
            self._add(self.prior, terms, self._typical(terms), TRUST)

    @property
    def factor(self) -> float:
        """Mean seconds of a call ÷ seconds of a typical call."""
        return self.measured / self.expected

    def predict(self, terms: Sequence[float]) -> float:
        """Return the expected mean seconds of a call with these terms, at least a microsecond."""
        return max(1e-6, self.factor * self._typical(terms))

    def learn(self, terms: Sequence[float], seconds: float) -> None:
        """Update the model with one measured call."""
        if seconds <= 0:
            return
        matrix, vector = self.sums
        for index, row in enumerate(matrix):
            matrix[index] = [FORGETTING * value for value in row]
            vector[index] *= FORGETTING
        self._add(self.sums, terms, seconds, 1.0)
        self._sweep()
        self.measured = FORGETTING * self.measured + seconds
        self.expected = FORGETTING * self.expected + self._typical(terms)

    def _typical(self, terms: Sequence[float]) -> float:
        seconds = 0.0
        for weight, term, scale in zip(self.weights, terms, self.scale):
            seconds += weight * term / scale
        return max(1e-6, seconds)

    def _add(self, sums: tuple[list, list], terms: Sequence[float], seconds: float, weight: float) -> None:
        # Divided by the measured seconds: neither a prefill nor a call during which the machine stalled may outweigh a
        # hundred other calls.
        x = [term / scale / seconds for term, scale in zip(terms, self.scale)]
        for row, left in enumerate(x):
            for column, right in enumerate(x):
                sums[0][row][column] += weight * left * right
            sums[1][row] += weight * left

    def _sweep(self) -> None:
        """Move each weight in turn to its best non-negative value, starting from the present weights."""
        rows = [[p + s for p, s in zip(*pair)] for pair in zip(self.prior[0], self.sums[0])]
        goals = [p + s for p, s in zip(self.prior[1], self.sums[1])]
        for _ in range(SWEEPS):
            for index, (row, goal) in enumerate(zip(rows, goals)):
                rest = -row[index] * self.weights[index]
                for value, weight in zip(row, self.weights):
                    rest += value * weight
                self.weights[index] = max(0.0, (goal - rest) / row[index])
