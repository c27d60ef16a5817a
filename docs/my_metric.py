"""A metric of your own, complete: whether an answer begins as an accepted one does, whatever follows.

lit-eemllm validate runs/mine --import docs/my_metric.py eval.metric=begins
"""

from lit_eemllm.evaluation.metrics import AnswerMetric, Truth, register_metric


@register_metric("begins")
class Begins(AnswerMetric):
    def score(self, answer: str, truth: Truth) -> float:
        return float(answer.strip().lower().startswith(tuple(accepted.lower() for accepted in truth.answers)))
