"""`secateur study`: plan a study, run missing work, write its experiments, page and MLflow runs.

secateur study                     lists the studies
secateur study NAME --plan         shows what would run, and runs nothing
secateur study NAME                runs it; after an interruption, the same command resumes it
"""

import argparse
from dataclasses import replace
from pathlib import Path

from secateur.base import settings
from secateur.base.errors import SecateurError, SettingsError
from secateur.pipeline import console
from secateur.studies import definition, estimate, marks, plan, progress
from secateur.studies.definition import Study
from secateur.studies.execution import check, snapshot
from secateur.studies.execution.experiments import Experiments
from secateur.studies.execution.keys import Graph
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.plan import Plan
from secateur.studies.progress import Progress, executor_of


def command(options: argparse.Namespace) -> None:
    """`secateur study`: list studies, show the plan of one, or run it."""
    if options.name is None:
        _list()
        return
    progress.check_options(options)
    if options.latency:
        from secateur.deploy import layer_times

        layer_times.check_packages(options.latency)  # before hours of training
    state = snapshot.take(Path.cwd())
    with state.held():
        study = definition.load(options.name, settings.raw())
        if study.space is not None:
            from secateur.studies import search

            if options.plan:
                search.show(study, study.space)
                return
            study = search.run(state, study, study.space, options)
        made = prepare(state, study)
        repeated = made.repeated()
        study = replace(study, notes=(*study.notes, *repeated), remarks=(*study.remarks, *repeated))
        if options.plan:
            show(study, made)
            return
        failed = run(state, study, made, options)
    if failed:
        raise SecateurError(failed)


def _list() -> None:
    """Print a line for each study; SettingsError at the end if a file is damaged."""
    names, damaged = definition.names(), []
    width = max(map(len, names), default=0)
    for name in names:
        try:
            console.say(f"{name:{width}}  {definition.about(name)}")
        except SettingsError as error:
            damaged.append(str(error))
    if damaged:
        raise SettingsError("; ".join(damaged))


def prepare(state: Snapshot, study: Study) -> Plan:
    """The plan of a study, with all results that the cache has."""
    graph = Graph(state.copy("plan"), state.root)
    made = plan.make(graph, study.cells)
    made.look_up()
    return made


def show(study: Study, made: Plan) -> None:
    """Print what the study consists of, and what would have to run."""
    check.settings(made)
    missing = made.missing()
    controls = sum(cell.control is not None for cell in made.cells)
    seeds = len({cell.seed for cell in made.cells})
    console.say(f"{study.name}: {study.about}")
    console.say(f"cells      {len(made.cells)}, of them {controls} controls; {seeds} seeds")
    trainings = {work.id for work in made.works.values() if plan.trains(made, work)}
    open_trainings = [work for work in missing if work.id in trainings]
    longest = max(made.by_cell, key=len)  # most rounds: has all stages in their order
    names = [made.works[id].stage.name for id in longest]
    stages: dict[str, list[int]] = {name: [0, 0] for name in names}
    for work in made.works.values():
        counts = stages.setdefault(work.stage.name, [0, 0])
        counts[0] += 1
        counts[1] += work.id not in made.entries
    console.say(f"trainings  {len(trainings)}, of them {len(open_trainings)} to be run")
    width = max(14, *map(len, stages))
    for stage, (count, to_run) in stages.items():
        console.say(
            f"  {stage:{width}} {count:5}, {count - to_run:5} from the cache, {to_run:5} to be run"
        )
    seconds, unknown = estimate.seconds(made, missing)
    if missing:
        words = f"about {progress.duration(seconds)} of work" if seconds else "no records to go by"
        more = f", without {', '.join(unknown)}, of which there are no records" if unknown else ""
        console.say(f"estimate   {words}{more if seconds else ''}")
    for note in study.notes:
        console.say(f"note       {note}")


def run(state: Snapshot, study: Study, made: Plan, options: argparse.Namespace) -> str | None:
    """Run missing work and write all results; returns one line about failures, or None."""
    work = Progress(state, made, Experiments(state, made, study.name))
    if made.missing():
        with executor_of(options, state, made.graph, len(made.missing())) as executor:
            check.settings(made)  # meanwhile the executor starts
            work.write_experiments()
            work.finish(executor)
    else:
        check.settings(made)
        work.write_experiments()
    for note in study.notes:
        console.say(f"note: {note}")
    done = [cell for number, cell in enumerate(made.cells) if made.finished(number)]
    cure = f"; `dvc exp apply {done[0].name}` brings one into the workspace" if done else ""
    console.say(
        f"{len(done)} of {len(made.cells)} cells are experiments of DVC; {len(work.ran)} "
        f"pieces of work were run{cure}"
    )
    if done:
        _publish(state, study, made, options)
    return work.failure()


def _publish(state: Snapshot, study: Study, made: Plan, options: argparse.Namespace) -> None:
    """Write page and runs in MLflow, unless both are up to date: their libraries take seconds."""
    folder = marks.REPORTS / study.name
    if options.latency:
        from secateur.studies import publish

        publish.measure_latency(state, made, folder, options)
    digest = marks.digest(state, study, made)
    if marks.has_page(folder, digest):
        console.say(f"{folder / marks.PAGE}: up to date")
    else:
        from secateur.studies import publish

        publish.write_page(state, study, made, folder, digest)
    mark = marks.InMlflow(state, study, digest)
    if not options.no_mlflow and not mark.complete():
        from secateur.studies import publish

        if publish.write_mlflow(study, made, folder):
            mark.set_complete()
