//! From video files to the frames the first module reads.
