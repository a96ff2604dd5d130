"""A call: ``describe`` checks and describes it, ``spec`` holds the records that describe it, ``mods`` its functions of scores
and masks; ``schema`` says how an op takes these records, ``layout`` how its results lie in memory."""
