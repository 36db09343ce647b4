"""A quarter of an hour on a GPU: tests, speed, then CIFAR-10 in the remaining time.

    python -m benchmarks.gpu --data DIR --seconds 560 --out OUT [--from BUNDLE]

__main__  the command: phases one after another, each a process with a deadline
speed     phase 2: the bare network, ours, and a plain torchvision pipeline
cifar10   phase 3: CIFAR-10 through the three stages, over several sittings if needed
bundle    a run in a few small files, from which another sitting resumes
carry     packs what a machine without a network needs (`make gpu-pack`)

Needs torch, torchvision, scikit-learn, pyarrow, rich, typer, pydantic and universal-pathlib.
Works without Ray, faiss, timm and optuna.
"""
