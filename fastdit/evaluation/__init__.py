"""Evaluation: features, metrics, the image sets that they compare, `fastdit evaluate` and `fastdit sweep`."""
