"""What the ``cflow-plugin`` command runs: a file or folder for each subcommand. Nothing else imports from here."""
