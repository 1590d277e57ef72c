"""Predictions of what a run needs, and measurements of what a machine gives: `fastdit plan`, `fastdit doctor`."""
