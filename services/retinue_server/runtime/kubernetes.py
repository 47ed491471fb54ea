"""Where the API server of Kubernetes is, for every engine that uses it; needs the extra `kubernetes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from lightkube import KubeConfig
from lightkube.core.exceptions import ConfigError

from retinue_server.runtime.addresses import StartError

if TYPE_CHECKING:
    from pathlib import Path


def find(kubeconfig: Path | None, setting: str) -> Any:
    """What connects to it (lightkube's SingleConfig), by a kubeconfig or by the pod's service account.

    Raises StartError that names the setting.
    """
    try:
        known = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_service_account()
        return known.get()
    except (ConfigError, yaml.YAMLError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise StartError(
            f"cannot find the API server: {_said(error)}; run in a pod with a service account, or set {setting}"
        ) from error


def _said(error: Exception) -> str:
    """In one line; a missing key says no more than its name."""
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
