"""Everything around the stages: the runner, run records, MLflow, the terminal, and commands.

`runner` and `record` are dependencies of every stage that makes or measures a model. `console`,
`preflight`, `latency_check`, `figures`, `tracking` and its parts `mlflow_store`, `mlflow_file` and
`mlflow_model` are observers: no result depends on them, so dvc.yaml does not name them.
`params_check`, `recipe`, `sync` and the modules in `commands` are subcommands of `secateur`;
`params_file` reads and changes settings by dotted keys, `tracked` reads the tracked files of any
commit.
"""
