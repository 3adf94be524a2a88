"""One TOML file per setting. `pass_*.toml` are the published ones; `demo.toml` learns in minutes on two cores."""
