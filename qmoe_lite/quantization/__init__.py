"""Which digit each weight gets: grids, Hessians, the GPTQ solver."""
