"""What runs around the stages: the runner, run records, MLflow, the terminal, and commands.

`runner` and `record` are dependencies of every stage that makes or measures a model. `tracking`,
`console` and `preflight` are observers: no result depends on them, so dvc.yaml does not name them.
`recipe`, `sync` and `libraries` are subcommands of `secateur`; `params_file` changes params.yaml.
"""
