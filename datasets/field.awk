# The number of a key on a line of JSON; nothing where there is none.
function field(key) {
  return match($0, "\"" key "\":[0-9.eE+-]+") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) : ""
}
