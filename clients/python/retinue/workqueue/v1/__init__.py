"""Generated stubs; see protos/retinue/workqueue/v1 for the contract."""
