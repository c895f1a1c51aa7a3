"""Runs a few kernels substep by substep on arrays that torch and Warp share, forwards and, by adjoints, backwards.

`Launcher` and `Spaces` are what all simulations share: a step is S substeps of a few launches, run one by one or
replayed as a captured graph, and its adjoint the same, last substep first; its arrays are a workspace, one for all
steps or one for each step of a window. `Substeps` is the rest for simulations without a grid, whose arrays are small
(fem.py and rigid.py): a workspace keeps what each substep computed. mpm.py has workspaces of its own, with grids.
"""

import math

import torch
import warp as wp

wp.config.log_level = wp.LOG_WARNING  # no line for every kernel that is loaded


def own_gradient(finite: torch.Tensor, adjoint: torch.Tensor) -> torch.Tensor:
    """Adjoint (N, ...) with zeros in environments that are not finite (N,).

    One that has blown up has no gradient, so that it does not reach the weights that all of them share.
    """
    return torch.where(finite.view(-1, *[1] * (adjoint.dim() - 1)), adjoint, 0.0)


def all_finite(tensors) -> torch.Tensor:
    """Environments (N,) whose entries are finite in every tensor (N, ...)."""
    return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], 1).isfinite().all(1)


def need_values(space, serial: int) -> None:
    """Raises RuntimeError where a workspace has been used again since a step."""
    if space.serial != serial:
        raise RuntimeError(
            "backward() came after detach(): the substeps of that window are overwritten"
        )


class Launcher:
    """A step of S substeps and its adjoint. A subclass has `forward_substep(s)` and `backward_substep(s)`.

    A launch is (kernel, dim, inputs, outputs, adjoints of inputs, adjoints of outputs); numbers are their own adjoint.
    Where it is (kernel, dim, inputs, outputs, launch), the last is its adjoint, written by hand.
    """

    def __init__(self, substeps: int, device, graph: bool):
        self.substeps, self.device, self.graph = substeps, torch.device(device), graph
        self.graphs = {}

    def forward_substep(self, s: int) -> None:
        raise NotImplementedError

    def backward_substep(self, s: int) -> None:
        raise NotImplementedError

    def launch(self, launch: tuple, adjoint: bool = False) -> None:
        """Launch a kernel, or its adjoint."""
        by_hand = len(launch) == 5
        if adjoint and by_hand:
            launch = launch[4]
        arguments = launch if adjoint and not by_hand else launch[:4]
        derived = adjoint and not by_hand
        wp.launch(*arguments, adjoint=derived, device=str(self.device), record_tape=False)

    def forward_all(self) -> None:
        for s in range(self.substeps):
            self.forward_substep(s)

    def backward_all(self) -> None:
        for s in reversed(range(self.substeps)):
            self.backward_substep(s)

    def run(self, name: str) -> None:
        """Run `forward_all` or `backward_all`, as a captured graph where that is wanted.

        Captured once, since the arrays stay where they are, and on Warp's own stream, since CUDA refuses to capture
        torch's default one.
        """
        work = getattr(self, name)
        if self.graph and name not in self.graphs:
            with wp.ScopedCapture(device=str(self.device), force_module_load=False) as capture:
                work()
            self.graphs[name] = capture.graph
        stream = None
        if self.device.type == "cuda":
            stream = wp.stream_from_torch(torch.cuda.current_stream(self.device))
        with wp.ScopedStream(stream):
            if self.graph:
                wp.capture_launch(self.graphs[name], stream=stream)
            else:
                work()


class Spaces:
    """The workspaces of a simulation, which a subclass makes (`new_workspace`).

    With `checkpoint` one serves all steps, and the backward pass of a step runs it again; without, each step of a
    window has its own, at most `window` of them.
    """

    def __init__(self, device, checkpoint: bool, window: int):
        self.checkpoint, self.window, self.spaces, self.used = checkpoint, window, [], 0
        self.bad_gradients = torch.zeros((), dtype=torch.int64, device=device)

    def new_workspace(self):
        raise NotImplementedError

    def workspace(self, tensors):
        """Arrays for a step from these tensors, kept until `detach` if its gradient is wanted."""
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        keep = wanted and not self.checkpoint
        if keep and self.used == self.window:
            raise RuntimeError(
                f"{self.window + 1} steps without detach(): more than window={self.window}"
            )
        if self.used == len(self.spaces):
            self.spaces.append(self.new_workspace())
        space = self.spaces[self.used]
        space.serial += 1
        self.used += keep
        return space

    def detach(self) -> None:
        """Begins a window: the arrays of older steps may be overwritten."""
        self.used = 0


class Substeps(Spaces):
    """S substeps of N environments.

    states, inputs, scratch   lists of (shape, Warp type); every shape begins with N. States have a value before and
                              after each substep, inputs hold for a whole step; before a substep, scratch and the
                              state to come are zero
    launches(state, inputs, scratch, following, adjoint)   -> [(kernel, dim, inputs, outputs)] of a substep, all lists
                              of arrays and numbers; a fifth entry is a launch by hand of its adjoint, in which
                              adjoint(array) is that of an array. Arrays that are none of those given are constants
    """

    def __init__(
        self,
        states,
        inputs,
        scratch,
        launches,
        *,
        substeps: int,
        device,
        dtype,
        graph: bool,
        checkpoint: bool = True,
        window: int = 32,
    ):
        super().__init__(device, checkpoint, window)
        parts = (states, inputs, scratch, launches)
        self.new_workspace = lambda: Workspace(*parts, substeps, torch.device(device), dtype, graph)

    def step(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The states after a step, differentiable with respect to states and inputs."""
        return _Step.apply(self, self.workspace(tensors), *tensors)


class Workspace(Launcher):
    """The arrays of a step and their adjoints. Scratch has values for each substep and one set of adjoints."""

    def __init__(self, states, inputs, scratch, launches, substeps, device, dtype, graph: bool):
        super().__init__(substeps, device, graph)
        self.serial, adjoints = 0, {}

        def new(specs, count, adjoint_count):
            """Values (count, all of it) and adjoints, each in one piece; tensors and arrays in it for each index."""
            sizes = [math.prod((*shape, *tail(kind))) for shape, kind in specs]
            values, adjoint = (
                torch.zeros(k, sum(sizes), dtype=dtype, device=device)
                for k in (count, adjoint_count)
            )
            rows = []
            for k in range(count):
                row = []
                pieces = (values[k].split(sizes), adjoint[k % adjoint_count].split(sizes))
                for (shape, kind), *pair in zip(specs, *pieces, strict=True):
                    pair = [piece.view(*shape, *tail(kind)) for piece in pair]
                    array, its_adjoint = (
                        wp.from_torch(piece, dtype=kind, requires_grad=False) for piece in pair
                    )
                    adjoints[id(array)] = its_adjoint
                    row.append((*pair, array))
                rows.append(row)
            return values, adjoint, rows

        self.sizes = [[(*shape, *tail(kind)) for shape, kind in some] for some in (states, inputs)]
        self.values, self.adj_values, self.states = new(states, substeps + 1, substeps + 1)
        _, self.adj_held, (self.inputs,) = new(inputs, 1, 1)
        self.scratch, self.adj_scratch, between = new(scratch, substeps, 1)
        self.adj_zeroed = wp.from_torch(self.adj_scratch, requires_grad=False)

        def with_adjoints(kernel, dim, given, found, by_hand=None) -> tuple:
            if by_hand:
                return kernel, dim, given, found, by_hand
            pair = [
                [adjoints.get(id(a)) if isinstance(a, wp.array) else a for a in part]
                for part in (given, found)
            ]
            return kernel, dim, given, found, *pair

        held = arrays(self.inputs)
        self.launches = []
        for s in range(substeps):
            now, following = arrays(self.states[s]), arrays(self.states[s + 1])
            found = launches(now, held, arrays(between[s]), following, lambda a: adjoints[id(a)])
            self.launches.append([with_adjoints(*launch) for launch in found])
        self.keep = (between, adjoints)  # arrays live as long as the launches that name them

    def held(self) -> list[torch.Tensor]:
        """All that it holds but the few inputs."""
        return [self.values, self.adj_values, self.scratch, self.adj_scratch]

    def forward_substep(self, s: int) -> None:
        for launch in self.launches[s]:
            self.launch(launch)

    def backward_substep(self, s: int) -> None:
        self.adj_zeroed.zero_()
        for launch in reversed(self.launches[s]):
            self.launch(launch, adjoint=True)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """States after a step, from states and inputs before it."""
        self.values.zero_()
        self.scratch.zero_()
        for (mine, *_), value in zip((*self.states[0], *self.inputs), tensors, strict=True):
            mine.copy_(value)
        self.run("forward_all")
        return pieces(self.values[-1].clone(), self.sizes[0])

    def backward(self, *adj: torch.Tensor) -> list[torch.Tensor]:
        """Adjoints of states and inputs before the step that was run last, from those of the states after it."""
        self.adj_values.zero_()
        self.adj_held.zero_()
        for (_, own, _), value in zip(self.states[-1], adj, strict=True):
            own.copy_(value)
        self.run("backward_all")
        found = self.adj_values[0].clone(), self.adj_held[0].clone()
        return [piece for one in zip(found, self.sizes, strict=True) for piece in pieces(*one)]


def tail(kind) -> tuple[int, ...]:
    """Shape of one entry of a Warp type."""
    return () if kind in (wp.float32, wp.float64) else tuple(kind._shape_)


def pieces(flat: torch.Tensor, shapes) -> tuple[torch.Tensor, ...]:
    """Tensors of these shapes, one after the other."""
    found = flat.split([math.prod(shape) for shape in shapes])
    return tuple(piece.view(shape) for piece, shape in zip(found, shapes, strict=True))


def arrays(row) -> list:
    """The Warp arrays of a row of (tensor, adjoint, array)."""
    return [array for _, _, array in row]


class _Step(torch.autograd.Function):
    """A step, as torch sees it."""

    @staticmethod
    def forward(ctx, sub, space, *tensors):
        ctx.sub, ctx.space, ctx.serial = sub, space, space.serial
        if sub.checkpoint:
            ctx.save_for_backward(*tensors)
        return space.forward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *adj):
        sub, space = ctx.sub, ctx.space
        if sub.checkpoint:
            space.forward(*ctx.saved_tensors)
        else:
            need_values(space, ctx.serial)
        found = space.backward(*adj)
        total = space.adj_values[0].sum() + space.adj_held.sum()
        if space.device.type == "cpu" and total.isfinite():  # a GPU would wait for the answer
            return None, None, *found
        finite = all_finite(found)
        sub.bad_gradients += (~finite).sum()
        return None, None, *(own_gradient(finite, tensor) for tensor in found)
