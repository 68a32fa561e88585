"""Reading compiled programs: HLO text in, collectives in the user's mesh axes out."""
