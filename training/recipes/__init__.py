"""One TOML file per setting. `pass_*.toml` are the published ones; `demo.toml` learns in minutes on two cores."""

from pathlib import Path

SHIPPED = Path(__file__).parent
"""Where the recipes are that come along."""
