//! A model in one file: dense parameters as they are, sub-keys and values packed, read in place.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use memlayer_core::element::Format;
use memlayer_core::{Config, DenseRows, E4m3, E5m2, RowStore, Table};
use memlayer_infer::Sizes;
use memlayer_quantize::image::{Sink, WriteError};
use memlayer_quantize::{Image, Pack, PackReport, Section, Writer};

use crate::config::ModelConfig;
use crate::error::{LmError, Result};
use crate::files::replace;
use crate::infer::{Reader, Source, Tables};
use crate::model::Model;
use crate::ops::with_values;
use crate::tokenizer::Tokenizer;

const CONFIG: &str = "model";
const TOKENIZER: &str = "tokenizer";
/// The fingerprint of the data, in hexadecimal.
const DATA: &str = "data";
const VALUES: &str = "values";

fn keys_name(layer: usize) -> String {
    format!("layers.{layer}.memory.keys")
}

/// What packing lost.
#[derive(Clone, Debug, Default)]
pub struct Packing {
    /// Bytes of the file.
    pub bytes: u64,
    /// Of the values and of each layer's sub-keys, by section name; empty where there is no memory.
    pub reports: Vec<(String, PackReport)>,
}

/// Writes `model` to `path`, sub-keys and values in `format`. The file is whole or as it was.
///
/// # Errors
/// [`LmError::File`] if a value does not pack, naming section and row, or the format is none of f32, int8, e4m3 and
/// e5m2; [`LmError::Io`].
pub fn pack(model: &Model, tokenizer: &Tokenizer, format: Format, path: &Path) -> Result<Packing> {
    let plan = Plan::new(model, tokenizer)?;
    let mut packing = Packing::default();
    replace(path, |file| {
        packing = match format {
            Format::F32 => plan.write::<f32>(file, path),
            Format::Int8 => plan.write::<i8>(file, path),
            Format::E4m3 => plan.write::<E4m3>(file, path),
            Format::E5m2 => plan.write::<E5m2>(file, path),
            other => Err(LmError::file(path, format!("models are packed to f32, int8, e4m3 or e5m2, not {other}"))),
        }?;
        Ok(())
    })?;
    Ok(packing)
}

/// What goes into the file.
struct Plan<'a> {
    config: [u8; Sizes::LEN],
    tokenizer: &'a [u8],
    data: String,
    dense: Vec<(String, Vec<usize>, Vec<f32>)>,
    /// By layer, normalized.
    keys: Vec<(usize, Vec<f32>)>,
    memory: Option<Config>,
    model: &'a Model,
}

/// A file as a sink of an image.
struct FileSink<'a>(&'a mut BufWriter<File>);

impl Sink for FileSink<'_> {
    type Error = std::io::Error;
    fn write(&mut self, bytes: &[u8]) -> Result<(), std::io::Error> {
        self.0.write_all(bytes)
    }
}

impl<'a> Plan<'a> {
    fn new(model: &'a Model, tokenizer: &'a Tokenizer) -> Result<Self> {
        let memory = model.config().memory_layer()?;
        let (mut dense, mut keys) = (Vec::new(), Vec::new());
        for (name, var) in model.variables().all() {
            // Sub-keys are packed with their norm and its gain in them.
            if !name.ends_with(".memory.keys") && !name.ends_with(".memory.key_norm.weight") {
                let values = with_values(var.as_tensor(), |v| Ok(v.to_vec()))?;
                dense.push((name, var.dims().to_vec(), values));
            }
        }
        if let Some(config) = memory {
            for layer in (0..model.config().layers).filter(|&layer| model.config().is_memory(layer)) {
                keys.push((layer, model.prepared_keys(layer, &config)?));
            }
        }
        let config = model.config().sizes()?.encode().map_err(|e| LmError::Config(e.to_string()))?;
        let data = format!("{:016x}", model.data());
        Ok(Self { config, tokenizer: tokenizer.table(), data, dense, keys, memory, model })
    }

    fn sections<E: Pack>(&self) -> Result<Vec<Section>, memlayer_quantize::image::LayoutError> {
        let texts = [(CONFIG, &self.config[..]), (TOKENIZER, self.tokenizer), (DATA, self.data.as_bytes())];
        let mut sections = Vec::new();
        for (name, text) in texts {
            sections.push(Section::bytes(name, text.len())?);
        }
        for (name, shape, _) in &self.dense {
            let (dim, rows) = shape.split_last().map_or((1, 1), |(dim, rest)| (*dim, rest.iter().product()));
            sections.push(Section::dense::<f32>(name, rows, dim)?);
        }
        if let Some(m) = &self.memory {
            let table = |name: &str, rows: usize, dim: usize| {
                if E::SCALED { Section::rows::<E>(name, rows, dim, dim) } else { Section::dense::<E>(name, rows, dim) }
            };
            for (layer, _) in &self.keys {
                sections.push(table(&keys_name(*layer), m.key_rows(), m.half_dim())?);
            }
            sections.push(table(VALUES, m.slots(), m.value_dim())?);
        }
        Ok(sections)
    }

    fn write<E: Pack>(&self, file: &mut BufWriter<File>, path: &Path) -> Result<Packing> {
        let fail = |e: WriteError<std::io::Error>| match e {
            WriteError::Sink(e) => LmError::io(path, e),
            e => LmError::file(path, e.to_string()),
        };
        let mut sections = self.sections::<E>().map_err(|e| LmError::file(path, e.to_string()))?;
        let bytes = memlayer_quantize::image::encoded_len(&sections).map_err(|e| LmError::file(path, e.to_string()))?;
        let mut reports = Vec::new();
        let mut writer = Writer::new(FileSink(file), &mut sections).map_err(fail)?;
        writer.bytes(CONFIG, &self.config).map_err(fail)?;
        writer.bytes(TOKENIZER, self.tokenizer).map_err(fail)?;
        writer.bytes(DATA, self.data.as_bytes()).map_err(fail)?;
        for (name, _, values) in &self.dense {
            writer.dense(name, values).map_err(fail)?;
        }
        if let Some(m) = &self.memory {
            let mut row = vec![E::default(); m.half_dim().max(m.value_dim())];
            for (layer, keys) in &self.keys {
                let (name, keys) = (keys_name(*layer), DenseRows::new(keys, m.half_dim()));
                let report = writer.pack::<E, _>(&name, &keys, &mut row[..m.half_dim()]).map_err(fail)?;
                reports.push((name, report));
            }
            if let Some(pool) = self.model.pool() {
                let report = pool.read(|rows, _| {
                    writer.pack::<E, _>(VALUES, &DenseRows::new(rows, m.value_dim()), &mut row[..m.value_dim()])
                });
                reports.push((VALUES.to_owned(), report?.map_err(fail)?));
            }
        }
        writer.finish().map_err(fail)?;
        Ok(Packing { bytes, reports })
    }
}

/// A packed model.
#[derive(Debug)]
pub struct PackedModel<B> {
    path: PathBuf,
    bytes: B,
    config: ModelConfig,
    tokenizer: Tokenizer,
}

impl<B: AsRef<[u8]>> PackedModel<B> {
    /// A model in `bytes`, the content of `path`, all of it verified.
    ///
    /// # Errors
    /// [`LmError::File`] if it is damaged, too new, or no model; it names the section.
    pub fn new(path: &Path, bytes: B) -> Result<Self> {
        let fail = |problem: String| LmError::file(path, problem);
        let image = Image::parse(bytes.as_ref()).map_err(|e| fail(e.to_string()))?;
        image.verify().map_err(|e| fail(e.to_string()))?;
        let sizes = Sizes::decode(image.bytes(CONFIG).map_err(|e| fail(e.to_string()))?);
        let config = ModelConfig::from(sizes.map_err(|e| fail(e.to_string()))?);
        let table = image.bytes(TOKENIZER).map_err(|e| fail(e.to_string()))?;
        let tokenizer = Tokenizer::from_table(table.to_vec()).map_err(|e| fail(e.to_string()))?;
        if tokenizer.vocab() != config.vocab {
            return Err(fail(format!("the tokenizer has {} tokens, the model {}", tokenizer.vocab(), config.vocab)));
        }
        let model = Self { path: path.to_owned(), bytes, config, tokenizer };
        model.with_reader(|_| Ok(()))?;
        Ok(model)
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The format of the values, or that of the dense parameters where there is no memory.
    ///
    /// # Errors
    /// [`LmError::File`] if the file changed under us.
    pub fn format(&self) -> Result<Format> {
        let image = self.image()?;
        Ok(image.section(VALUES).and_then(|s| s.content().format()).unwrap_or(Format::F32))
    }

    /// The fingerprint of the data it was trained on; 0 if the file does not say.
    ///
    /// # Errors
    /// [`LmError::File`] if the file changed under us.
    pub fn data(&self) -> Result<u64> {
        let image = self.image()?;
        let text = image.bytes(DATA).ok().and_then(|bytes| core::str::from_utf8(bytes).ok());
        Ok(text.and_then(|text| u64::from_str_radix(text, 16).ok()).unwrap_or(0))
    }

    /// Bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.as_ref().len()
    }

    /// Reads the model where it lies.
    ///
    /// # Errors
    /// [`LmError::File`] if a section is missing or of another size, or what `look` gives.
    pub fn with_reader<R>(&self, look: impl FnOnce(&Reader<'_>) -> Result<R>) -> Result<R> {
        let source = ImageSource { path: &self.path, image: self.image()? };
        look(&Reader::new(&self.config, &source)?)
    }

    fn image(&self) -> Result<Image<'_>> {
        Image::parse(self.bytes.as_ref()).map_err(|e| LmError::file(&self.path, e.to_string()))
    }
}

/// An image as a source.
struct ImageSource<'p, 'a> {
    path: &'p Path,
    image: Image<'a>,
}

impl ImageSource<'_, '_> {
    fn check(&self, name: &str, table: &impl Table, rows: usize, dim: usize) -> Result<()> {
        if (table.rows(), table.dim()) == (rows, dim) {
            return Ok(());
        }
        let found = format!("section `{name}` is {} rows of {}, not {rows} of {dim}", table.rows(), table.dim());
        Err(LmError::file(self.path, found))
    }

    /// Both tables of a layer, their sizes checked.
    fn pair<S: RowStore>(&self, layer: usize, config: &Config, keys: S, values: S) -> Result<(S, S)> {
        self.check(&keys_name(layer), &keys, config.key_rows(), config.half_dim())?;
        self.check(VALUES, &values, config.slots(), config.value_dim())?;
        Ok((keys, values))
    }
}

impl<'a> Source<'a> for ImageSource<'_, 'a> {
    fn dense(&self, name: &str, len: usize) -> Result<&'a [f32]> {
        let rows = self.image.dense::<f32>(name).map_err(|e| LmError::file(self.path, e.to_string()))?;
        if rows.codes().len() == len {
            return Ok(rows.codes());
        }
        let found = format!("section `{name}` has {} values, not {len}", rows.codes().len());
        Err(LmError::file(self.path, found))
    }

    fn tables(&self, layer: usize, config: &Config) -> Result<Tables<'a>> {
        let keys = keys_name(layer);
        let fail = |e: memlayer_quantize::ImageError| LmError::file(self.path, e.to_string());
        let format = self.image.section(VALUES).and_then(|s| s.content().format());
        macro_rules! tables {
            ($variant:ident, $e:ty, $read:ident) => {{
                let (keys, values) = (self.image.$read::<$e>(&keys).map_err(fail)?, self.image.$read::<$e>(VALUES));
                let (keys, values) = self.pair(layer, config, keys, values.map_err(fail)?)?;
                Ok(Tables::$variant(keys, values))
            }};
        }
        match format {
            Some(Format::F32) => tables!(F32, f32, dense),
            Some(Format::Int8) => tables!(Int8, i8, rows),
            Some(Format::E4m3) => tables!(E4m3, E4m3, rows),
            Some(Format::E5m2) => tables!(E5m2, E5m2, rows),
            Some(other) => Err(LmError::file(self.path, format!("section `{VALUES}` is {other}, which is not read"))),
            None => Err(LmError::file(self.path, format!("has no section `{VALUES}`"))),
        }
    }
}
