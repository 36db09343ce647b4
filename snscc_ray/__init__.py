from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snscc_ray.answers.report.notebook import Report as Report
    from snscc_ray.estimator import SNSCC as SNSCC

__all__ = ["SNSCC", "Report"]


def __getattr__(name: str) -> Any:
    # Only when asked for: it brings torch, for which the command line does not wait.
    if name == "SNSCC":
        from snscc_ray.estimator import SNSCC

        return SNSCC
    if name == "Report":
        from snscc_ray.answers.report.notebook import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
