"""Predictions of what a run needs, and measurements of a machine: `fastdit plan`, `fastdit doctor` and `fastdit info`."""
