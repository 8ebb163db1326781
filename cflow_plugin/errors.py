class CflowError(RuntimeError):
    pass
