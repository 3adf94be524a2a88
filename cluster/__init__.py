"""The jobs a cluster runs. The only place that imports Ray."""
