//! Scores of videos: of each the mean of the class probabilities over its views.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::nn::loss::topk_correct;
use crate::{Error, Result};

/// One video, when all its views are through.
pub struct Video<'a> {
    /// Its place in the dataset.
    pub place: usize,
    /// Its class.
    pub label: usize,
    /// The class found.
    pub predicted: usize,
    /// Mean over views of softmax(logits).
    pub softmax: &'a [f64],
}

/// Counts over the videos, whose views come one after another.
pub struct Votes {
    classes: usize,
    views: usize,
    /// Views so far.
    seen: usize,
    /// Sum of the present video's probabilities.
    sum: Vec<f64>,
    /// Videos so far.
    pub videos: u64,
    /// Of these, how many had their label first.
    pub top1: u64,
    /// And among the first five.
    pub top5: u64,
    /// `[label][prediction]`
    confusion: Vec<u64>,
}

impl Votes {
    /// For videos of `views` views each.
    pub fn new(classes: usize, views: usize) -> Self {
        let (sum, confusion) = (vec![0.0; classes], vec![0; classes * classes]);
        Votes { classes, views, seen: 0, sum, videos: 0, top1: 0, top5: 0, confusion }
    }

    /// Adds a batch of `logits`, `[B, K]`, with its labels, −1 past the last view. `whole` is called for each video that is through.
    ///
    /// # Errors
    /// Those of `whole`.
    pub fn add(&mut self, logits: &[f32], labels: &[i32], mut whole: impl FnMut(Video) -> Result<()>) -> Result<()> {
        for (row, &label) in logits.chunks_exact(self.classes).zip(labels) {
            let Ok(class) = usize::try_from(label) else { continue };
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            self.sum.iter_mut().zip(softmax(&row)).for_each(|(sum, p)| *sum += p);
            self.seen += 1;
            if !self.seen.is_multiple_of(self.views) {
                continue;
            }
            let mean: Vec<f64> = self.sum.iter().map(|sum| sum / self.views as f64).collect();
            self.sum.fill(0.0);
            // Probabilities of one view rank as its logits do, which differ where tiny probabilities are all zero.
            let ranks = if self.views == 1 { &row } else { &mean };
            let predicted = (0..ranks.len()).max_by(|&a, &b| ranks[a].total_cmp(&ranks[b])).unwrap_or(0);
            self.videos += 1;
            self.top1 += u64::from(topk_correct(ranks, label, 1));
            self.top5 += u64::from(topk_correct(ranks, label, 5));
            self.confusion[class * self.classes + predicted] += 1;
            whole(Video { place: self.videos as usize - 1, label: class, predicted, softmax: &mean })?;
        }
        Ok(())
    }

    /// The share of videos that so many are.
    pub fn share(&self, correct: u64) -> f64 {
        correct as f64 / self.videos.max(1) as f64
    }

    /// Of each class: videos, and how many of them were found.
    pub fn classes(&self) -> impl Iterator<Item = (u64, u64)> {
        self.confusion.chunks_exact(self.classes).enumerate().map(|(k, row)| (row.iter().sum(), row[k]))
    }

    /// The mean over classes that there are videos of, of the share that was found.
    pub fn mean_class_accuracy(&self) -> f64 {
        let shares = self.classes().filter(|(videos, _)| *videos > 0);
        let shares: Vec<f64> = shares.map(|(videos, found)| found as f64 / videos as f64).collect();
        shares.iter().sum::<f64>() / shares.len().max(1) as f64
    }

    /// Writes the confusion matrix as CSV.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn write_confusion(&self, names: &[String], path: &Path) -> Result<()> {
        let mut text = format!("label,{}\n", header(names));
        for (name, row) in names.iter().zip(self.confusion.chunks_exact(self.classes)) {
            let row: Vec<String> = row.iter().map(u64::to_string).collect();
            text += &format!("{},{}\n", quoted(name), row.join(","));
        }
        std::fs::write(path, text).map_err(|e| Error::io(path, e))
    }
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|x| (x - top).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn header(names: &[String]) -> String {
    names.iter().map(|name| quoted(name)).collect::<Vec<_>>().join(",")
}

/// A file of scores: a video a line.
pub struct Scores {
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
    json: bool,
}

impl Scores {
    /// Whether `path` names a kind of file that can be written: JSON lines or not.
    ///
    /// # Errors
    /// [`Error::Input`] for another kind.
    pub fn is_json(path: &Path) -> Result<bool> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => Ok(false),
            Some("jsonl") => Ok(true),
            _ => Err(Error::input(format!("--scores {}: it ends in .csv or .jsonl", path.display()))),
        }
    }

    /// Begins a file, which has its name once it is whole.
    ///
    /// # Errors
    /// As [`Scores::is_json`]; [`Error::Io`] if the disk refuses.
    pub fn create(path: &Path, names: &[String]) -> Result<Self> {
        let json = Self::is_json(path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        let file = tempfile::Builder::new().suffix(".partial").permissions(permissions).tempfile_in(folder);
        let mut scores =
            Scores { file: BufWriter::new(file.map_err(|e| Error::io(path, e))?), path: path.to_path_buf(), json };
        if !json {
            scores.line(&format!("video,label,predicted,{}", header(names)))?;
        }
        Ok(scores)
    }

    fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.file, "{text}").map_err(|e| Error::io(&self.path, e))
    }

    /// Writes a video called `id`.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn write(&mut self, id: &str, video: &Video) -> Result<()> {
        let &Video { label, predicted, softmax, .. } = video;
        let softmax: Vec<f32> = softmax.iter().map(|&p| p as f32).collect();
        if self.json {
            let line = serde_json::json!({ "video": id, "label": label, "predicted": predicted, "softmax": softmax });
            return self.line(&line.to_string());
        }
        let softmax: Vec<String> = softmax.iter().map(f32::to_string).collect();
        self.line(&format!("{},{label},{predicted},{}", quoted(id), softmax.join(",")))
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn finish(self) -> Result<()> {
        let Scores { file, path, .. } = self;
        let whole = file.into_inner().map_err(std::io::IntoInnerError::into_error);
        let named = whole.and_then(|file| {
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        });
        named.map_err(|e| Error::io(&path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_of_probabilities_decides() {
        // Two views of two videos of three classes, and padding.
        let logits = [[0.0, 1.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 2.0, 0.0], [9.0, 0.0, 0.0]];
        let (mut votes, mut seen) = (Votes::new(3, 2), Vec::new());
        let mut whole = |video: Video| {
            assert!((video.softmax.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            seen.push((video.place, video.label, video.predicted));
            Ok(())
        };
        // Batches end within a video.
        votes.add(&logits[..3].concat(), &[0, 0, 1], &mut whole).unwrap();
        votes.add(&logits[3..].concat(), &[1, -1], &mut whole).unwrap();
        assert_eq!(seen, [(0, 0, 0), (1, 1, 2)]);
        assert_eq!((votes.videos, votes.top1, votes.top5), (2, 1, 2));
        assert_eq!(votes.classes().collect::<Vec<_>>(), [(1, 1), (1, 0), (0, 0)]);
        assert_eq!(votes.mean_class_accuracy(), 0.5);
    }

    /// Of one view, far logits count though their probabilities are no numbers apart.
    #[test]
    fn one_view_ranks_by_logits() {
        let mut votes = Votes::new(7, 1);
        let far = [0.0, -2001.0, -2002.0, -2003.0, -2004.0, -2005.0, -2006.0];
        votes.add(&far, &[4], |_| Ok(())).unwrap();
        assert_eq!((votes.top1, votes.top5), (0, 1));
    }

    #[test]
    fn names_are_quoted_in_csv() {
        assert_eq!(header(&["a".into(), "b \"c\", d".into()]), "\"a\",\"b \"\"c\"\", d\"");
        assert!(Scores::is_json(Path::new("a.jsonl")).unwrap() && !Scores::is_json(Path::new("a.csv")).unwrap());
        assert_eq!(Scores::is_json(Path::new("a.txt")).unwrap_err().exit_code(), 2);
    }
}
