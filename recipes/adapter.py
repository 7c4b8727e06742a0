"""Adapt a LightningModule to the recipes, any one without an adapter of its own.

The recipes train and test with Lightning's Trainer. Whatever else they do with a module goes
through an :class:`Adapter`: the results of a test, calibration, the loss that bits are allocated
by, the programs. It has answers for every module whose networks take tensors with the examples
along their first axis. A module with other needs names a subclass in its attribute
``recipe_adapter``, the class or its dotted path.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hydra.utils import get_class
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from lightning_nna import emulate
from lightning_nna.deploy import Program
from lightning_nna.emulation.attachment import attached
from lightning_nna.weights.selection import matches_path

#: Arguments of a program, and the function of the module and them that it computes.
Part = tuple[list[Any], Callable[..., Any]]

EVERYTHING = ("*",)
#: Runtime whose time on this CPU is measured.
FAST_RUNTIME = "litert-xnnpack"
_STAGES = ("test/", "test_")


@dataclass(frozen=True)
class DeployedResults:
    """Results of the programs of a module on the test set.

    Attributes:
        outputs: Number of activations that the programs returned.
        equal_outputs: Number of them that equal the emulation in every bit.
        examples: Number of examples.
        results: Results of the test, see :meth:`Adapter.results`, through the programs.
    """

    outputs: int
    equal_outputs: int
    examples: int
    results: dict[str, Any]


@dataclass(frozen=True)
class Speed:
    """Time and calls of the programs of a module on this CPU.

    Attributes:
        calls: Calls of each program for a unit of work, see :attr:`Adapter.unit`, by its name.
        figures: What was measured, for ``summary.json``.
        text: The same for a reader.
    """

    calls: dict[str, float]
    figures: dict[str, float]
    text: str


class Adapter:
    """Everything that the recipes do with a module beyond Lightning, for any module.

    Args:
        module: Module to train, test or deploy.
        datamodule: Its data.
        targets: Patterns of the networks that run on the accelerator, see ``targets`` of
            :class:`.NNAEmulation`: they are compressed, counted and deployed.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> adapter = Adapter(BoringModel(), BoringDataModule())
        >>> adapter.results({"test/loss": 0.5, "val/loss": 0.4})
        {'loss': 0.5}
    """

    known_results: ClassVar[tuple[str, ...]] = ()
    """Names of the results of every test; none where only a test tells."""
    titles: ClassVar[Mapping[str, str]] = {}
    """Titles of the results that a table shows, those of fractions with ", %"; none for all."""
    unit: ClassVar[str] = "example"
    """Unit of work that the time and the cycles of a deployment are for."""

    def __init__(
        self,
        module: LightningModule,
        datamodule: LightningDataModule,
        targets: Sequence[str] = EVERYTHING,
    ) -> None:
        self.module, self.datamodule, self.targets = module, datamodule, list(targets)

    def configure(self, config: DictConfig) -> None:
        """Take settings of a recipe that belong neither to the model nor to the data.

        Args:
            config: Settings of the run.

        Raises:
            ValueError: If it has settings that this module does not use.
        """
        if config.get("beam_width") not in (None, 1):
            self._refuse("beam_width", config.beam_width)

    # Tests

    def require_test(self) -> None:
        """Raise if there is no test, before a training that it would end.

        Raises:
            ValueError: If the module has no ``test_step``, or the data module no test set.
        """
        needed = [
            ("test_step", self.module, LightningModule),
            ("test_dataloader", self.datamodule, LightningDataModule),
        ]
        for method, instance, parent in needed:
            if not is_overridden(method, instance, parent=parent):
                raise ValueError(
                    f"{type(instance).__name__} has no {method}, and a run ends with a test: "
                    "define it, or train with test=false"
                )

    def results(self, logged: Mapping[str, float]) -> dict[str, Any]:
        """Return the results of the last test, as ``summary.json`` has them.

        Args:
            logged: What the module has logged in the test, by name. ``test/`` or ``test_`` is cut
                off; what was logged for other stages is left out.
        """
        return {
            name.removeprefix(stage): value
            for name, value in logged.items()
            for stage in _STAGES
            if name.startswith(stage)
        }

    def titles_of(self, results: Mapping[str, Any]) -> dict[str, str]:
        """Return the titles of the results that a table shows.

        Args:
            results: Results of a test.
        """
        numbers = {key: key for key, value in results.items() if isinstance(value, float)}
        return dict(self.titles) or numbers

    def write_results(self, run_dir: Path) -> None:
        """Write what is worth a file of its own about the last test; nothing by default.

        Args:
            run_dir: Run folder.
        """

    # Calibration and allocation

    def inputs_of(self, batch: Any) -> tuple[Any, ...]:
        """Return the arguments of the module's forward in a batch of its data.

        Args:
            batch: Batch of a data loader: a tensor, or a tuple or list that begins with one.

        Raises:
            TypeError: If it is anything else.
        """
        first = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(first, Tensor):
            raise TypeError(
                f"a batch of {type(self.datamodule).__name__} is {_described(batch)}, and which of "
                f"it is the input of {type(self.module).__name__} is not known: name a subclass of "
                "recipes.adapter.Adapter with inputs_of(batch) in the attribute recipe_adapter of "
                "the module"
            )
        return (first,)

    def training_batches(self) -> Iterator[Any]:
        """Yield the training batches as the Trainer does, also of several loaders."""
        return _batches(self.datamodule.train_dataloader(), "max_size_cycle")

    def test_batches(self) -> Iterator[Any]:
        """Yield the batches of the test set as the Trainer does, of one loader after another."""
        return _batches(self.datamodule.test_dataloader(), "sequential")

    def run(self, batch: Any) -> Any:
        """Run the networks on a batch as they are used, on every path that will be deployed.

        Args:
            batch: Batch of the data.

        Raises:
            TypeError: If the module has no forward, or one that takes other arguments.
        """
        return self.module(*self._arguments(batch))

    def _arguments(self, batch: Any) -> tuple[Any, ...]:
        """Return the arguments of the forward in a batch, which it takes."""
        name = type(self.module).__name__
        remedy = "name a subclass of recipes.adapter.Adapter in the attribute recipe_adapter"
        if not is_overridden("forward", self.module, parent=LightningModule):
            raise TypeError(
                f"{name} has no forward, which runs its networks on a batch: define it, or "
                f"{remedy}, with run(batch)"
            )
        arguments = self.inputs_of(batch)
        try:
            inspect.signature(self.module.forward).bind(*arguments)
        except TypeError as error:
            raise TypeError(
                f"forward of {name} does not take the {len(arguments)} inputs of a batch "
                f"({error}): {remedy}, with inputs_of(batch)"
            ) from None
        return arguments

    def loss(self, batches: Sequence[Any]) -> float:
        """Return the loss of batches by which bits are allocated: the mean of the training loss.

        Args:
            batches: Training batches.

        Raises:
            ValueError: If no loss is known without training.
        """
        name = type(self.module).__name__
        remedy = (
            "name a subclass of recipes.adapter.Adapter with loss(batches) in the attribute "
            "recipe_adapter of the module"
        )
        if not self.module.automatic_optimization:
            raise ValueError(f"training_step of {name} optimizes by itself: {remedy}")
        takes_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        losses, weights = [], []
        with warnings.catch_warnings():
            # The module logs its loss, and there is no Trainer.
            warnings.filterwarnings("ignore", message=".*self.trainer. reference is not registered")
            for position, batch in enumerate(batches):
                arguments = (batch, position) if takes_index else (batch,)
                step = self.module.training_step(*arguments)
                loss = step["loss"] if isinstance(step, Mapping) else step
                if loss is None:  # The Trainer leaves such a batch out.
                    continue
                losses.append(float(torch.as_tensor(loss).detach()))
                weights.append(_size_of(batch))
        if not losses:
            raise ValueError(f"training_step of {name} returns no loss: return it, or {remedy}")
        return float(np.average(losses, weights=weights))

    def priced(self, batches: Sequence[Any], config: DictConfig) -> Part:
        """Return arguments and a function that call every layer as often as the unit takes.

        Args:
            batches: Training batches.
            config: Configuration ``allocate`` of ``recipes/conf``.
        """
        inputs = self._arguments(batches[0])
        return [_first(each) for each in inputs], lambda module, *arguments: module(*arguments)

    # Deployment

    def programs(self, config: DictConfig) -> dict[str, Part]:
        """Return the parts of the emulated module that become programs, by their names.

        Args:
            config: Configuration ``deploy`` of ``recipes/conf``.

        Raises:
            ValueError: If ``targets`` names no children, or one of them takes no tensors.
        """
        for key in ("chunk_steps", "utterance_frames"):
            if config.get(key) is not None:
                self._refuse(key, config[key])
        networks = self.networks()
        calls: dict[str, _Call] = {}
        batch = next(self.test_batches())
        emulator = attached(self.module)
        if emulator is None:
            raise ValueError("the module has no ranges: calibrate it first")
        with ExitStack() as stack:
            for name, path in networks.items():
                network = self.module.get_submodule(path)
                keep = partial(_keep_call, calls, name)
                handle = network.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(emulate(self.module, emulator.spec, targets=emulator.targets))
            self.run(batch)
            parts: dict[str, Part] = {}
            for name, path in networks.items():
                if name not in calls:
                    raise ValueError(
                        f"{name} did not run on a batch of the test set: targets names it, and "
                        f"the forward of {type(self.module).__name__} does not call it"
                    )
                example = []
                for value in calls[name].inputs:
                    one = _first(value)
                    if isinstance(one, Tensor):
                        qparams = emulator.state.qparams_of(value)
                        if qparams is not None:
                            emulator.state.set_qparams(one, qparams)
                    example.append(one)
                parts[name] = example, partial(_call_child, path, calls[name])
        return parts

    def networks(self) -> dict[str, str]:
        """Return the paths of the networks that become programs, by the programs' names.

        They are ``targets``, or the module, whose path is empty.

        Raises:
            ValueError: If ``targets`` is a pattern, and not the name of a child.
        """
        if list(self.targets) == list(EVERYTHING):
            return {"network": ""}
        children = dict(self.module.named_modules())
        if unknown := [name for name in self.targets if name not in children]:
            raise ValueError(
                f"targets={list(self.targets)} has {unknown[0]}, which names no child of "
                f"{type(self.module).__name__}: a program is made of each, so name children as "
                f"{', '.join(list(dict(self.module.named_children()))[:4])}"
            )
        return {path.replace(".", "_"): path for path in self.targets}

    def test(
        self,
        callbacks: Sequence[Callback] = (),
        *,
        accelerator: str = "auto",
        batches: int | None = None,
    ) -> dict[str, Any]:
        """Test the module, and return the results.

        Args:
            callbacks: Callbacks of the test, such as the emulation.
            accelerator: Accelerator of the Trainer.
            batches: Number of the first batches that are tested; None for all.
        """
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            callbacks=list(callbacks),
            limit_test_batches=batches,
        )
        return self.tested(trainer)

    def tested(self, trainer: Trainer) -> dict[str, Any]:
        """Test the module with a Trainer, and return the results.

        Args:
            trainer: Trainer with callbacks.
        """
        loaders = trainer.test(self.module, self.datamodule, verbose=False)
        return self.results({name: value for each in loaders for name, value in each.items()})

    def test_deployed(
        self, folder: Path, callbacks: Sequence[Callback], *, batches: int | None = None
    ) -> DeployedResults:
        """Test the programs, and compare their outputs with the emulation's.

        Every network runs emulated, then its program with the same arguments, example by example;
        the module goes on with the program's outputs.

        Args:
            folder: Folder of the programs.
            callbacks: Emulation and weight methods.
            batches: Number of the first batches that are tested; None for all.
        """
        programs = {
            name: _Replaced(name, Program(folder / f"{name}.tflite")) for name in self.networks()
        }
        counter = _ExampleCounter()
        with _replaced(self.module, self.networks(), programs):
            results = self.test([*callbacks, counter], accelerator="cpu", batches=batches)
        return DeployedResults(
            sum(each.outputs for each in programs.values()),
            sum(each.equal_outputs for each in programs.values()),
            counter.examples,
            results,
        )

    def speed(self, folder: Path, *, batches: int | None = None) -> Speed:
        """Measure the time of LiteRT's fast kernels for the first batch of the test set.

        Args:
            folder: Folder of the programs.
            batches: Number of batches that a subclass may run; one is enough here.
        """
        programs = {
            name: _Timed(name, Program(folder / f"{name}.tflite", runtime=FAST_RUNTIME))
            for name in self.networks()
        }
        batch = next(self.test_batches())
        with torch.no_grad(), _replaced(self.module, self.networks(), programs):
            self.run(batch)
        examples = _size_of(batch)
        seconds = sum(each.seconds for each in programs.values()) / examples
        return Speed(
            {name: each.calls / examples for name, each in programs.items()},
            {"seconds_per_example": seconds},
            f"{1000 * seconds:.3f} ms per example on this CPU",
        )

    def _refuse(self, key: str, value: object) -> None:
        raise ValueError(
            f"{key}={value} is not used: {type(self.module).__name__} is no transducer; leave it "
            "out"
        )


def adapter_of(
    module: LightningModule,
    datamodule: LightningDataModule,
    targets: Sequence[str] = EVERYTHING,
) -> Adapter:
    """Build the adapter that a module names, or the one for every module.

    Args:
        module: Module; its attribute ``recipe_adapter`` is a subclass of :class:`Adapter` or its
            dotted path.
        datamodule: Data of the module.
        targets: Patterns of the networks that run on the accelerator.
    """
    return adapter_class(type(module))(module, datamodule, targets)


def adapter_class(module: type | Callable[..., Any]) -> type[Adapter]:
    """Return the class of the adapter that a class of modules names.

    Args:
        module: Class of the module, or a function that builds it.

    Raises:
        TypeError: If it names something else.

    Example:
        >>> adapter_class(LightningModule)
        <class 'recipes.adapter.Adapter'>
    """
    named = getattr(module, "recipe_adapter", Adapter)
    adapter = get_class(named) if isinstance(named, str) else named
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(
            f"recipe_adapter of {getattr(module, '__name__', module)} is {named!r}, and must be a "
            "subclass of recipes.adapter.Adapter or its dotted path"
        )
    return adapter


def names_within(names: Any, targets: Sequence[str]) -> list[str]:
    """Return the names that belong to the networks of ``targets``.

    Args:
        names: Names of parameters and buffers.
        targets: Patterns, see ``targets`` of :class:`.NNAEmulation`.

    Example:
        >>> names_within(["model.a.weight", "ctc.weight"], ["model"])
        ['model.a.weight']
    """
    return [name for name in names if any(matches_path(target, name) for target in targets)]


class _ExampleCounter(Callback):
    """Count the examples of a test."""

    def __init__(self) -> None:
        self.examples = 0

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.examples += _size_of(batch)


@dataclass
class _Replaced:
    """A program in the place of an emulated network; compares each output with the network's."""

    name: str
    program: Program
    calls: int = 0
    outputs: int = 0
    equal_outputs: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, inputs: tuple[Any, ...], emulated: Any) -> Any:
        leaves, structure = tree_flatten(emulated)
        results = self.run(inputs)
        if len(results) != len(leaves):
            raise ValueError(
                f"the program of {self.name} has {len(results)} outputs, and its network "
                f"returns {len(leaves)} values: let the network return each tensor that it "
                "computes once, and nothing else"
            )
        for result, expected in zip(results, leaves, strict=True):
            if result.shape != tuple(expected.shape):
                raise ValueError(
                    f"{self.name} returns a tensor of the shape {tuple(expected.shape)}, and its "
                    f"program, example by example, one of {result.shape}: let the network take and "
                    "return tensors with the examples along the first axis"
                )
            self.outputs += result.size
            self.equal_outputs += int((result == expected.numpy(force=True)).sum())
        tensors = [
            torch.from_numpy(result).to(leaf.device)
            for result, leaf in zip(results, leaves, strict=True)
        ]
        return tree_unflatten(tensors, structure)

    def run(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Run the program on each example, and join the results along the first axis."""
        shapes = [tuple(each.shape[1:]) for each in inputs if isinstance(each, Tensor)]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            raise ValueError(
                f"an example of {self.name} has inputs of the shapes {shapes}, and "
                f"the first had {self.shapes}: a program has one shape, so pad the inputs of all "
                "examples of the test set to one length, as model.frames of recipes/asr/ctc.py"
            )
        calls = _examples(inputs)
        self.calls += len(calls)
        rows = self.program.run_all(calls)
        return [np.concatenate(each) for each in zip(*rows, strict=True)]


@dataclass
class _Timed(_Replaced):
    """A program in the place of a network, whose time counts."""

    seconds: float = 0.0

    def __call__(self, inputs: tuple[Any, ...], emulated: Any) -> Any:
        _, structure = tree_flatten(emulated)
        began = time.perf_counter()
        results = self.run(inputs)
        self.seconds += time.perf_counter() - began
        return tree_unflatten([torch.from_numpy(result) for result in results], structure)


@contextmanager
def _replaced(
    module: LightningModule,
    networks: Mapping[str, str],
    programs: Mapping[str, _Replaced],
) -> Iterator[None]:
    """Let programs answer in the place of networks."""
    with ExitStack() as stack:
        for name, path in networks.items():
            answer = partial(_answer, module, programs[name])
            handle = module.get_submodule(path).register_forward_hook(answer, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _answer(
    module: LightningModule,
    program: _Replaced,
    network: nn.Module,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    output: Any,
) -> Any:
    """Replace the output of a network by its program's, with the same quantization parameters."""
    answer = program(_Call(arguments, named).inputs, output)
    emulator = attached(module)
    if emulator is not None:
        for leaf, emulated in zip(tree_flatten(answer)[0], tree_flatten(output)[0], strict=True):
            qparams = emulator.state.qparams_of(emulated)
            if qparams is not None:
                emulator.state.set_qparams(leaf, qparams)
    return answer


@dataclass(frozen=True)
class _Call:
    """Arguments of a network, by position and by name."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def tensor_names(self) -> list[str]:
        """Names of tensors, which are inputs of the program; others are constants of it."""
        return [name for name, value in self.named.items() if isinstance(value, Tensor)]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Inputs of the program."""
        return (*self.arguments, *(self.named[name] for name in self.tensor_names))


def _keep_call(
    calls: dict[str, _Call],
    name: str,
    network: nn.Module,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    calls.setdefault(name, _Call(arguments, named))


def _call_child(path: str, call: _Call, module: nn.Module, *inputs: Any) -> Any:
    """Call a child of a module by its path, the module itself for none, as ``call`` was."""
    count = len(call.arguments)
    named = {**call.named, **dict(zip(call.tensor_names, inputs[count:], strict=True))}
    return module.get_submodule(path)(*inputs[:count], **named)


def _batches(loaders: Any, mode: Any) -> Iterator[Any]:
    """Iterate over what a data module returns: a loader, or a list or dict of loaders."""
    if isinstance(loaders, list | tuple | dict):
        loaders = CombinedLoader(loaders, mode)
    if isinstance(loaders, CombinedLoader):
        return (batch for batch, _, _ in loaders)
    return iter(loaders)


def _first(value: Any) -> Any:
    """Return the first example of a tensor of a batch; anything else as it is."""
    return value[:1] if isinstance(value, Tensor) and value.ndim else value


def _examples(inputs: tuple[Any, ...]) -> list[list[Any]]:
    """Split the arguments of a batch into those of each example."""
    count = _size_of(inputs)
    return [
        [
            each[row : row + 1].numpy(force=True)
            if isinstance(each, Tensor) and each.ndim and len(each) == count
            else each
            for each in inputs
        ]
        for row in range(count)
    ]


def _size_of(batch: Any) -> int:
    """Return the number of examples in a batch."""
    leaves = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim]
    return len(leaves[0]) if leaves else 1


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(str, batch))}"
    if isinstance(batch, list | tuple) and batch:
        return f"a {type(batch).__name__} that begins with a {type(batch[0]).__name__}"
    return f"a {type(batch).__name__}"
