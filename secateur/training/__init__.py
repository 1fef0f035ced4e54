"""Training of one network: `loop.fit` is the only training loop.

Its parts: training steps (`step`), optimizers and learning rates (`optim`), accuracy
(`evaluation`), the state that a resumed training restores (`state`, `resume`), the interfaces of
penalties, parametrizations and callbacks (`penalty`, `parametrization`, `callbacks`), averages of
the weights (`averaging`), distillation from a teacher (`distillation`), devices and processes
(`engine`), global torch state (`determinism`). For pruned networks: longer trainings (`budget`) and
new batch-norm statistics (`recalibrate`).
"""
