"""The commands of the laboratory, one a file; each is imported only when it is called."""
