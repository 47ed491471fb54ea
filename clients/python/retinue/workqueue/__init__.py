"""Generated stubs; see protos/retinue/workqueue for the contract."""
