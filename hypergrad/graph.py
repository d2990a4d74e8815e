"""Which loss reads which problem: found out by one dry call of each, checked before anything runs.

`Graph` knows the levels, what each problem depends on, and refuses what has no exact meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypergrad.methods import ForwardUnrolled, Implicit, Method, Reptile, ResponseMethod, Unrolled
from hypergrad.problem import Problem
from hypergrad.reads import Reads


@dataclass
class Graph:
    """Levels of problems, lowest first, and who depends on whom."""

    levels: list[list[Problem]]
    reads: dict[str, Reads] = field(default_factory=dict)
    partial_hessian: bool = False

    def __post_init__(self) -> None:
        """Index the problems."""
        self.problems = {p.name: p for level in self.levels for p in level}
        self.level_of = {p.name: k for k, level in enumerate(self.levels) for p in level}
        self._depends: dict[str, set[str]] = {}

    def below(self, name: str) -> list[str]:
        """Return the problems below `name` whose response its loss takes part in, lowest level first."""
        reads = self.reads[name].connected
        return [
            other
            for other, level in sorted(self.level_of.items(), key=lambda item: item[1])
            if level < self.level_of[name] and other in reads and self.problems[other].responds
        ]

    def used(self, name: str) -> set[str]:
        """Return the problem's variables that its own loss or, if it has levels below, a lower problem depends on."""
        level = self.level_of[name]
        readers = [r for other, r in self.reads.items() if other == name or self.level_of[other] < level]
        keys = {key for reads in readers for key in reads.keys}
        return {parameter for problem, parameter in (key.split(".", 1) for key in keys) if problem == name}

    def is_perturbed(self, name: str) -> bool:
        """Return whether the loss of `name`, or of one above that it is nested in, is evaluated off the record."""
        method = self.problems[name].method
        if method is not None and method.perturbs and self.problems[name].responds:
            return True
        return any(name in self.below(p) and self.is_perturbed(p) for p in self.problems)

    def depends(self, name: str) -> set[str]:
        """Return the problems on which the solution of `name` depends, its lower levels' responses included.

        They are above it; or beside it, where both move a level below that one of them reads.
        """
        if name not in self._depends:
            level = self.level_of[name]
            found, queue = set[str](), [name]
            while queue:
                present = queue.pop()
                direct = self.reads[present].connected | self.reads[present].started
                reached = {other for other in direct if self.level_of[other] > level}
                for other in self.below(present):
                    reached |= {t for t in self.depends(other) if self.level_of[t] > level or self._beside(t, level)}
                queue += [other for other in reached - found if self.level_of[other] == level]
                found |= reached
            self._depends[name] = found - {name}
        return self._depends[name]

    def _beside(self, name: str, level: int) -> bool:
        """Return whether `name` is on this level and moves with the others there."""
        return self.level_of[name] == level and self.problems[name].responds and not self.partial_hessian

    def coupled(self, name: str) -> list[str]:
        """Return the problems on the level of `name` that move with it, itself included, in order."""
        level = self.level_of[name]
        peers = {other for other in self.depends(name) if self.level_of[other] == level}
        return [p.name for p in self.levels[level] if p.name in peers or p.name == name]

    def reaching(self, name: str) -> list[str]:
        """Return the problems below `name` whose solutions depend on it, directly or through others, lowest first."""
        reaching: set[str] = set()
        for level in reversed(range(self.level_of[name])):
            for problem in self.levels[level]:  # `depends` is closed under the moves of problems beside it
                targets = self.depends(problem.name)
                if problem.responds and (name in targets or targets & reaching):
                    reaching.add(problem.name)
        return [p.name for level in self.levels for p in level if p.name in reaching]

    def targets(self, name: str, top: str) -> list[str]:
        """Return the problems through which the solution of `name` depends on `top`, `top` included."""
        relevant = {*self.reaching(top), top}
        return [other for other in self.depends(name) if other in relevant]

    def moving(self, name: str) -> list[str]:
        """Return the problems that `name` sees as constants and that step before all of its readers have pulled on it.

        Those of the top level do not: they step last. Nor is one a constant to a reader whose gradient passes it.
        """

        def is_constant(other: str) -> bool:
            readers = [t for t in self.problems if self.level_of[t] > level and name in self.reaching(t)]
            return any(other not in self.targets(name, t) for t in readers)

        level, top = self.level_of[name], len(self.levels) - 1
        seen = self.reads[name].accessed - {name, *self.below(name)}
        return sorted(other for other in seen if self.level_of[other] < top and is_constant(other))

    def overtaken(self, name: str) -> set[str]:
        """Return the problems below `name` that it reads past a level between which moves them.

        Each own step of that level leaves their last run behind, so they run once more before a step of `name`, and
        with them those in between that were left behind in turn.
        """
        level = self.level_of[name]
        found, queue = set[str](), self.below(name)
        while queue:
            present = queue.pop()
            between = [
                other for other in self.depends(present) if self.level_of[present] < self.level_of[other] < level
            ]
            if between and present not in found:
                found |= set(self.coupled(present))
                queue += between
        return found

    def validate(self) -> None:
        """Raise a ValueError, naming the problems, for a graph that has no exact meaning."""
        for problem in self.problems.values():
            self._validate_reads(problem)
        self._validate_starts()
        for problem in self.problems.values():
            self._validate_role(problem)
            self._validate_methods(problem)

    def validate_top(self) -> None:
        """Raise a ValueError for options that need a level above, on problems that have none."""
        for problem in self.levels[-1]:
            name = problem.name
            for option, value in (("steps", problem.steps), ("every", problem.every)):
                if value != 1:
                    raise ValueError(
                        f"problem {name!r} is on the top level, so {option}={value} has no level above to refer to. "
                        "Leave it 1 and run the engine for more steps."
                    )
            if problem.data is None:
                raise ValueError(
                    f"problem {name!r} is on the top level and has no data: there is no level above to give it "
                    "batches. Pass data=."
                )
            if problem.tasks is not None:
                raise ValueError(
                    f"problem {name!r} is on the top level; tasks={problem.tasks} needs a level above that reads it."
                )

    def _validate_reads(self, problem: Problem) -> None:
        level = self.level_of[problem.name]
        for other in self.reads[problem.name].connected:
            if self.level_of[other] == level and self.problems[other].responds:
                raise ValueError(
                    f"problems {problem.name!r} and {other!r} are on one level, and the loss of {problem.name!r} "
                    f"depends on {other!r}: which responds to which is not defined. Put them on levels of their own, "
                    f"read it as hg.detach(models.{other}), or give {other!r} detach=True."
                )

    def _validate_starts(self) -> None:
        for name, reads in self.reads.items():
            for other in reads.started:
                if self.level_of[other] <= self.level_of[name] and self.problems[other].responds:
                    what = "a cycle" if other == name or name in self.reads[other].touched_by_start else "not above it"
                    raise ValueError(
                        f"problem {name!r}: its start depends on {other!r}, which is {what}: a start may depend on "
                        f"problems of higher levels only. Read it as hg.detach(models.{other}), or move {other!r} up."
                    )
            for other in reads.touched_by_start - {name}:
                if name in self.reads[other].touched_by_start:
                    raise ValueError(
                        f"problems {name!r} and {other!r} begin at each other's values: a cycle through start."
                    )

    def _validate_role(self, problem: Problem) -> None:
        name, level = problem.name, self.level_of[problem.name]
        top = len(self.levels) - 1
        if not self.used(name):
            raise ValueError(
                f"problem {name!r}: nothing depends on its variables, neither its own loss nor a problem below it. "
                f"Call models.{name}(...) in a loss, without .detach() or torch.no_grad()."
            )
        if level < top:
            readers = [p.name for p in self.problems.values() if name in self.reads[p.name].accessed]
            if not any(self.level_of[reader] > level for reader in readers) and not self._read_through_others(name):
                if not any(self.problems[r].detach or problem.detach for r in readers):
                    above = [p.name for p in self.levels[level + 1]]
                    raise ValueError(
                        f"problem {name!r} is read by no problem above it: the losses of {above} never touch "
                        f"models.{name}. Read it there, or leave {name!r} out."
                    )
        if level > 0:
            lower = [p.name for k in range(level) for p in self.levels[k]]
            if all(self.problems[other].detach for other in lower):
                return
            if not any(name in self.depends(other) for other in lower):
                raise ValueError(
                    f"problem {name!r} is on an upper level, but no problem below it ({lower}) depends on "
                    f"models.{name}: its hypergradient would have no indirect part. Read it in a lower loss, start or "
                    "hyper, without detaching it, or train it apart."
                )

    def _read_through_others(self, name: str) -> bool:
        """Return whether a problem above reads one below whose solution depends on `name`."""
        level = self.level_of[name]
        above = [other for other in self.problems if self.level_of[other] > level]
        return any(name in self.depends(lower) for other in above for lower in self.below(other))

    def _validate_methods(self, problem: Problem) -> None:
        name = problem.name
        reaching = self.reaching(name)
        read = [other for other in self.below(name) if other in reaching]
        self._validate_tasks(problem, reaching)
        self._validate_coupled(problem, reaching)
        passed = [other for other in reaching if any(other in self.depends(lower) for lower in read)]
        for other in dict.fromkeys([*read, *passed]):
            method = self.problems[other].method
            if method is None:
                raise ValueError(
                    f"problem {other!r} needs a method: {name!r} differentiates through its solution. Give "
                    f"method=hg.Implicit(hg.CG()), hg.Unrolled() or another, or detach=True to hold it constant."
                )
            self._validate_method(problem, self.problems[other], method, read)

    def _validate_tasks(self, reader: Problem, reaching: list[str]) -> None:
        counts = {other: self.problems[other].tasks for other in reaching}
        if all(count is None for count in counts.values()):
            return
        below = {p.name for p in self.levels[self.level_of[reader.name] - 1]}
        if len(set(counts.values())) > 1 or not set(counts) <= below:
            raise ValueError(
                f"problem {reader.name!r}: the problems it differentiates through must all have the same number of "
                f"tasks and be on the level directly below it, got {counts}."
            )
        for other in counts:
            if self.below(other):
                raise ValueError(
                    f"problem {other!r} has tasks and levels below it; only a lowest level can have tasks."
                )

    def _validate_coupled(self, reader: Problem, reaching: list[str]) -> None:
        for name in reaching:
            group = self.coupled(name)
            if len(group) == 1:
                continue
            inexact = [other for other in group if not isinstance(self.problems[other].method, Implicit)]
            above = self.problems[reader.name].method is not None and any(
                reader.name in self.reaching(other) for other in self.problems
            )
            if inexact or above:
                raise ValueError(
                    f"problems {group} on one level move each other through a level below that they share, so their "
                    f"solutions respond to {reader.name!r} together. That is exact for hg.Implicit on each of them and "
                    f"one level above; here {inexact or [reader.name]} stand in the way. Put them on levels of their "
                    "own, or pass Engine(partial_hessian=True), which holds the level below fixed in curvature and "
                    "mixed partial."
                )

    def _validate_method(self, reader: Problem, lower: Problem, method: Method, read: list[str]) -> None:
        kind = type(method).__name__
        chained = len(read) > 1 or any(
            t != reader.name and self.level_of[t] < self.level_of[reader.name]
            for t in self.targets(lower.name, reader.name)
        )
        if not isinstance(method, (ResponseMethod, Reptile)) and chained:
            raise ValueError(
                f"problem {lower.name!r}: {kind} has no best response, so it cannot be chained, and {reader.name!r} "
                f"needs one of {read}. Use hg.Implicit, hg.Unrolled or another method with a rule for {lower.name!r}."
            )
        if isinstance(method, Reptile):
            return
        self._validate_start_is_used(lower, method)
        nested = [r for r in self.below(lower.name)]
        if not nested or self.partial_hessian:
            return
        for inner in nested:
            inner_method = self.problems[inner].method
            if inner_method is None or not self.depends(inner) & ({lower.name} | self.depends(lower.name)):
                continue
            enough = isinstance(inner_method, ResponseMethod) and (inner_method.differentiable or method.perturbs)
            if not enough:
                raise ValueError(
                    f"problem {inner!r}: {type(inner_method).__name__} has no differentiable rule, and {lower.name!r} "
                    f"above it is itself differentiated by {kind}, which needs one. Use hg.Unrolled or hg.Implicit "
                    f"for {inner!r}, or Engine(partial_hessian=True), which holds it fixed in curvature and mixed "
                    "partial."
                )

    def _validate_start_is_used(self, lower: Problem, method: Method) -> None:
        if lower.start is None or isinstance(method, (Unrolled, ForwardUnrolled)):
            return
        ignored = self.reads[lower.name].started - self.reads[lower.name].connected
        if ignored:
            raise ValueError(
                f"problem {lower.name!r} begins at a function of {sorted(ignored)}, which {type(method).__name__} "
                "ignores, and its loss does not read them: their hypergradient would be lost. Use hg.Unrolled "
                "(truncate=0 is first-order MAML) or hg.Reptile, or add a proximal term to the loss that reads them "
                "(iMAML)."
            )
