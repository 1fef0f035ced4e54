"""Prints, as JSON, the contents of plans for grids of cells.

    python planned.py FOLDER

For each grid with 1 to 4 decays, settings of pruners and seeds: how many pieces of work each stage
has, how many of them are trainings, and whether each follows those whose outputs it reads. FOLDER
is a committed project. In a separate process, DVC is imported as it is for `secateur study`.
"""

import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

from secateur.studies import plan
from secateur.studies.definition import PlannedCell
from secateur.studies.execution import snapshot
from secateur.studies.execution.keys import Graph


def main(folder):
    """Plan all grids on one graph, and print the result."""
    state = snapshot.take(folder)
    graph, chance = Graph(state.copy("plan"), state.root), random.Random(1)
    found = []
    for sizes in itertools.product(range(1, 5), repeat=3):
        cells = [
            PlannedCell(f"{d}-{p}-{s}", "", "", s, None, settings(d, p, s))
            for d, p, s in itertools.product(*map(range, sizes))
        ]
        chance.shuffle(cells)
        made = plan.make(graph, cells)
        place = {id: number for number, id in enumerate(made.works)}
        found.append({
            "sizes": sizes,
            "stages": Counter(work.stage.name for work in made.works.values()),
            "trainings": sum(plan.trains(made, work) for work in made.works.values()),
            "in order": all(
                place[other] < place[id]
                for id, work in made.works.items() for other in work.upstream.values()
            ),
        })  # fmt: skip
    json.dump(found, sys.stdout)


def settings(decay, pruner, seed):
    """The settings of one cell."""
    sensitivity = 0.1 * (pruner + 1)
    return {"seed": seed, "decay": 0.1 * decay, "pruners": {"std": {"sensitivity": sensitivity}}}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
