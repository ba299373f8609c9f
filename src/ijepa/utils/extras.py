"""Optional packages."""

from importlib.util import find_spec

from ijepa.utils.errors import UserError


def require_extra(module: str, extra: str, what: str) -> None:
    """Refuse `what`, a flag or feature, if the optional package that has `module` is not installed.

    Raises:
        UserError: names the module, and the extra that installs it.
    """
    if find_spec(module) is None:
        raise UserError(what, f"needs {module}, which is not installed", f"pip install 'ijepa-pretrain[{extra}]'")
