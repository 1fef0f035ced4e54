"""What runs around the stages: the runner, run records, MLflow, the terminal, and commands.

`runner` and `record` are dependencies of every stage that makes or measures a model. `console`,
`preflight`, `latency_check`, `figures`, `tracking` and its parts `mlflow_store`, `mlflow_file` and
`mlflow_model` are observers: no result depends on them, so dvc.yaml does not name them.
`params_check`, `recipe` and `sync` are subcommands of `secateur`, as are those in `commands`;
`params_file` changes params.yaml, `tracked` reads the tracked files of any commit.
"""
