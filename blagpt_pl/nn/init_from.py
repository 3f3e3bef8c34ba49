"""A model starts with the weights of another: the same one, or a smaller one that it has grown out of.

Formula  every tensor of the checkpoint's `state_dict` is copied to the one of its name and shape; a module that `Grows` makes
         of the smaller one's tensors its own. What the file does not hold starts as `otherwise` has it
Differs  from resuming: only weights are taken over. Optimizer, schedule, data and step begin anew: it is another run
Cost     one reading of the file when the model is built; none without memory (a meta device, fake tensors), nor where a
         checkpoint of its own follows, since then `lab/without_donor.py` leaves `otherwise` alone
"""

from torch import Tensor, nn, no_grad

from blagpt_pl.nn.base import Init, Site
from blagpt_pl.nn.saved import read_checkpoint


class Grows:
    """What can take over the tensors of a smaller one of its kind, such that it begins as the same function."""

    def grown(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this module, from that of a smaller one or of one as large; tensors by their local names.

        What has no place here is handed on as it is, for the caller to compare.

        Raises:
            ValueError: it would be another function, or the other is larger; says how to mend it.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it takes over a smaller one's tensors")


class FromCheckpoint(Init):
    """The weights of a checkpoint, by their names.

    Args:
        path: the file.
        otherwise: how the parameters start before that: so start those that the file does not hold.

    Raises:
        ValueError: `otherwise` is none, or reads a file itself.
    """

    def __init__(self, path: str, otherwise: Init) -> None:
        if not isinstance(otherwise, Init) or isinstance(otherwise, FromCheckpoint):
            raise ValueError(  # noqa: TRY004
                f"model.init.otherwise: {type(otherwise).__name__} (expected a start without a file, such as GPT2Init)"
            )
        self.path = path
        self.otherwise = otherwise

    def __call__(self, model: nn.Module, site: Site) -> None:
        """Start the model, then copy what the file holds into its parameters and buffers, in place.

        Raises:
            ValueError: no such checkpoint, or one that does not fit; says what is to be mended.
        """
        self.otherwise(model, site)
        if any(parameter.untyped_storage().device.type == "meta" for parameter in model.parameters()):
            return  # without memory: a meta device, or fake tensors
        saved = read_checkpoint(self.path)["state_dict"]
        if not isinstance(saved, dict) or not all(isinstance(tensor, Tensor) for tensor in saved.values()):
            raise self._misfit("its state_dict holds more than tensors (expected a model's)")
        donor = self._fitted(model, dict(saved))
        with no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(donor[name])

    def _fitted(self, model: nn.Module, donor: dict[str, Tensor]) -> dict[str, Tensor]:
        """The donor's tensors, grown where they must be; exactly the names and shapes of the model."""
        for place, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, Grows):
                before = f"{place}." if place else ""
                names = [name for name in donor if name.startswith(before)]
                old = {name.removeprefix(before): donor.pop(name) for name in names}
                try:
                    donor |= {before + name: tensor for name, tensor in module.grown(old).items()}
                except ValueError as error:
                    raise self._misfit(f"{place}: {error}") from None
        own = model.state_dict(keep_vars=True)
        for name, tensor in own.items():
            if name not in donor:
                raise self._misfit(f"holds no {name}; fix: the parts and layers it was trained with")
            if donor[name].shape != tensor.shape:
                there, here = tuple(donor[name].shape), tuple(tensor.shape)
                raise self._misfit(f"{name}: {there} there, {here} here; fix: the sizes it was trained with")
        if unused := [name for name in donor if name not in own]:
            raise self._misfit(
                f"{unused[0]}: has no place in this model; fix: the parts and layers it was trained with"
            )
        first: dict[int, str] = {}
        for name, tensor in own.items():
            one = first.setdefault(id(tensor), name)
            if one != name and not donor[one].equal(donor[name]):
                raise self._misfit(f"{one} and {name}: two tensors there, one here; fix: untie them")
        return donor

    def _misfit(self, what: str) -> ValueError:
        return ValueError(f"model.init: {self.path}: {what}")
