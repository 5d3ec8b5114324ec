"""Other trainers' names, for programs and packages written for those: faces on the one implementation."""
